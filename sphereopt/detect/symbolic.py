"""The symbolic part alone, for models without values or without room for a copy."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .certify import Certificate
from .claims import bias_of
from .hypotheses import Hypotheses
from .judge import Judge, Numbers
from .partition import Partition
from .proof import Proof, prove
from .report import Finding
from .twin import Twin, hash_seed


def symbolic(twin: Twin, model: nn.Module, seed: int) -> tuple[list[Finding], Proof]:
    """Return findings and proof of a copy on the meta device.

    Without numbers to say which partitions are worth a proof, the unknowns are all rows; then, of
    matrices that do not split by rows, all columns.

    Args:
        twin: The copy.
        model: The user's model.
        seed: For the model's randomness.
    """
    shapes = {name: tuple(p.shape) for name, p in twin.params.items()}
    rows = {
        name: Partition.blocks(shape[0], shape[0]) if shape else Partition.whole(shape)
        for name, shape in shapes.items()
    }
    guess = Hypotheses([], rows, set())
    proof = prove(twin, rows, hash_seed(seed, "proof"))
    on = {name for claim in proof.claims if claim.count > 1 for name in claim.names}
    columns = {
        name: Partition.blocks(shape[1], shape[1], axis=1)
        for name, shape in shapes.items()
        if name not in on and len(shape) > 1
    }
    for name in list(columns):
        bias = bias_of(name, shapes)
        if bias is not None and shapes[bias] == shapes[name][1:2]:
            columns[bias] = rows[bias]
    if columns:
        whole = {name: Partition.whole(shape) for name, shape in shapes.items()}
        second = prove(twin, {**whole, **columns}, hash_seed(seed, "proof"))
        finer = [c for c in second.claims if c.count > 1 and columns.keys() >= set(c.names)]
        split = {name for claim in finer for name in claim.names}
        kept = [claim for claim in proof.claims if split.isdisjoint(claim.names)]
        proof = replace(proof, claims=[*kept, *finer])
    judge = Judge(model, shapes, guess, proof, Numbers([], None))
    return judge.findings(Certificate(0.0, judge.proved, [], set()), None), proof
