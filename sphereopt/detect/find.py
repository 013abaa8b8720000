"""``find_spheres``: which weights of a model are scale-invariant, and at which granularity."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import euler
from .certify import DetectionError, Trial, certify
from .copying import check, has_room, unwrap
from .hypotheses import Hypotheses, hypotheses, refined
from .ideal import DOUBLE, SINGLE, TINY_EPS, Precision
from .judge import Judge, Numbers
from .partition import Partition
from .proof import DRAWS, Proof, prove
from .report import Finding, SphereReport
from .symbolic import symbolic
from .twin import NotFiniteError, Twin, hash_seed, preserved_rng

# Tried in turn: a model that overflows at the usual generic point may not nearer to its weights.
_SPREADS = (0.1, 0.01, 0.001)

_NO_VALUES = (
    "The model has no values (meta device): the symbolic part alone, no numbers and no certificate."
)
_NO_ROOM = "No room for a copy: the symbolic part alone, no numbers and no certificate."
_SINGLE = "Measured in float32, with ratios up to 1e-4 taken for zero: {}."


def find_spheres(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    output: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> SphereReport:
    """Find the weights whose norm does not change the function: ``f(c*w) = f(w)`` for ``c > 0``.

    Three stages, in float64, with the normalization eps removed, at random points near the weights:
    a set S of entries can be such a sphere only if ``sum_S w * df/dw = 0`` (Euler), which one
    backward tests for all rows, columns, blocks and tensors; a run that carries degrees of
    homogeneity through every operation proves which of these hold, which only jointly, and what
    breaks the others; then all spheres are rescaled at once and the outputs compared. The answer
    holds for the *training* function, on what the example input exercises.

    Args:
        model: Any module; it, its gradients, buffers and modes and all random number generators are
            left exactly as found. A model in ``eval()`` is analysed as if in ``train()``; a norm
            layer in ``eval()`` inside a model in ``train()`` counts as frozen.
        args: Positional inputs as a tuple, or a single tensor. The batch needs several values per
            normalized channel, like any training batch.
        kwargs: Keyword inputs.
        loss: Maps the model's output to what is trained, for losses that normalise or that penalise
            weights. Called on the copy; a penalty may refer to the parameters of ``model``.
        output: Selects what counts as the function instead, for example ``lambda out: out[0]``.
            Without either: the output's "loss", else "logits", else "last_hidden_state", else every
            floating-point tensor in it.
        seed: For the random points, cotangents and factors.

    Returns:
        A mapping from parameter name to finding: the sphere ("row", "col", "block:K", "tensor",
        pieces of these, or ``None``), what it is joint with, status, measurements, reason.

    Raises:
        TypeError: If ``args`` is neither tuple nor tensor, or the model cannot be copied.
        ValueError: If a parameter is uninitialized or sharded; if the example batch has one value
            per normalized channel; if outputs are not finite, not there, or do not depend on the
            parameters; if both ``loss`` and ``output`` are given.
        DetectionError: If the numbers contradict a proof, which is a mistake of this library.

    Notes:
        With its real eps no weight is exactly invariant; ``evidence.at_real_eps`` says how far from
        it this one is. The proof follows the path the example input takes: Python branches on
        other data may differ. What passes the numbers without a proof has status "numerical". A
        model on the meta device gets the proof alone, one without room for a float64 copy float32
        numbers; ``report.notes`` says so. Needs about 8 bytes per parameter, and activations.

    References:
        * Norm matters: efficient and accurate normalization schemes in deep networks (Hoffer,
          Banner, Golan, Soudry, 2018), equation 1, https://arxiv.org/abs/1803.01814
        * Spherical perspective on learning with normalization layers (Roburin et al., 2022),
          https://arxiv.org/abs/2006.13382
        * Types for units-of-measure: theory and practice (Kennedy, 2009)

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sphereopt.detect import find_spheres
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
        >>> report = find_spheres(model, torch.randn(16, 8))
        >>> report.spheres
        {'0.weight': 'row'}
        >>> report["0.bias"].status, report["3.weight"].reason
        ('inert', 'the output itself scales with it')
    """
    if not isinstance(args, tuple | Tensor):
        raise TypeError(
            f"args is a {type(args).__name__}; pass positional inputs as a tuple, args=(x,), or "
            "keyword inputs as kwargs="
        )
    if loss is not None and output is not None:
        raise ValueError("both loss and output are given; let the one function do what both should")
    inputs = (args,) if isinstance(args, Tensor) else args
    inner = unwrap(model)
    check(inner)
    choose = output if loss is None else loss

    def twin(precision: Precision, device: str | None = None) -> Twin:
        return Twin(inner, inputs, kwargs or {}, choose, precision, device)

    with preserved_rng(), torch.inference_mode(False), torch.enable_grad():
        findings, proof, notes = _found(twin, inner, seed)
    named = {finding.name: finding for finding in findings}
    return SphereReport(
        named, _aliases(model, inner), tuple(proof.symmetries), (*notes, *proof.failures)
    )


def _found(
    twin: Callable[..., Twin], model: nn.Module, seed: int
) -> tuple[list[Finding], Proof, tuple[str, ...]]:
    """Return findings, proof and notes: by numbers in some precision, or without."""
    if any(p.is_meta for p in model.parameters()):
        return *symbolic(twin(DOUBLE, "meta"), model, seed), (_NO_VALUES,)
    dtypes = [precision.dtype for precision in (DOUBLE, SINGLE) if has_room(model, precision.dtype)]
    if not dtypes:
        return *symbolic(twin(DOUBLE, "meta"), model, seed), (_NO_ROOM,)
    if DOUBLE.dtype not in dtypes:
        return *_measured(twin(SINGLE), model, seed), (_SINGLE.format("there is no room for more"),)
    try:
        return *_measured(twin(DOUBLE), model, seed), ()
    except (RuntimeError, TypeError) as error:
        if not _lacks_double(error):
            raise
        why = _SINGLE.format(f"the model does not run in float64: {error}")
        return *_measured(twin(SINGLE), model, seed), (why,)


def _lacks_double(error: Exception) -> bool:
    return not isinstance(error, DetectionError) and bool(
        re.search("[Dd]ouble|float64", str(error))
    )


def _measured(twin: Twin, model: nn.Module, seed: int) -> tuple[list[Finding], Proof]:
    """Filter by numbers, prove, certify."""
    shapes = {name: tuple(p.shape) for name, p in twin.params.items()}
    # The user's own point comes first: what is wrong with the inputs shows here, undisguised.
    twin.place(None)
    own = hash_seed(seed, "own")
    real = euler.take_probe(twin, own, eps=None, radial=True)
    probe, spread = _generic_probe(twin, seed)
    guess = hypotheses([probe], shapes, real)
    proof = _proof(twin, guess, [probe], _point(seed, 0))
    more: list[euler.Probe] = []
    if proof.random_path:
        more = [_probe(twin, _point(seed, i), spread, dropout=True) for i in range(3, 3 + DRAWS)]
        guess = hypotheses([probe, *more], shapes, real)
        proof = _proof(twin, guess, [probe, *more], _point(seed, 0))
    judge = Judge(model, shapes, guess, proof, Numbers([probe, *more], real))
    if judge.numerical or more:
        # Without a proof the numbers stand alone: more of them, and kinks further away.
        more += [_probe(twin, _point(seed, i), spread, dropout=i == 2) for i in (1, 2)]
        judge = Judge(model, shapes, guess, proof, Numbers([probe, *more], real))
        trial = Trial(twin, _point(seed, -1), spread, twin.precision.certificate_eps)
    else:
        there = probe.outputs
        trial = Trial(twin, _point(seed, 0), spread, TINY_EPS, dropout=True, reference=there)
    inert = sorted(guess.inert)
    certificate = certify(trial, judge.proved, judge.numerical, inert, judge.detached)
    at_real = None
    if certificate.kept:
        twin.place(None)
        at_real = Trial(twin, own, None, None, reference=real.outputs).near(certificate.kept)
    return judge.findings(certificate, at_real), proof


def _proof(twin: Twin, guess: Hypotheses, probes: list[euler.Probe], seed: int) -> Proof:
    shapes = {name: tuple(p.shape) for name, p in twin.params.items()}
    units: dict[str, Partition] = {
        name: guess.units.get(name, Partition.whole(shapes[name])) for name in shapes
    }
    proof = prove(twin, units, seed)
    plain = [claim for claim in proof.claims if proof.tables.isdisjoint(claim.names)]
    finer = refined(plain, units, probes, shapes)
    return proof if finer is None else prove(twin, finer, seed)


def _generic_probe(twin: Twin, seed: int) -> tuple[euler.Probe, float]:
    """Return a probe at a random point, the copy there, and how far that is.

    With dropout, which belongs to the training function: Linear with bias -> Dropout -> BatchNorm
    is invariant without the mask only.
    """
    for spread in _SPREADS:
        try:
            return _probe(twin, _point(seed, 0), spread, dropout=True), spread
        except NotFiniteError:
            continue
    raise NotFiniteError(
        "the model's outputs are finite at its weights but not next to them; is a parameter at the "
        "edge of its domain (a variance near zero, say), or the model unstable?"
    )


def _point(seed: int, index: int) -> int:
    return hash_seed(seed, str(index))


def _probe(twin: Twin, seed: int, spread: float, *, dropout: bool) -> euler.Probe:
    twin.place(seed, spread)
    return euler.take_probe(twin, seed, eps=TINY_EPS, dropout=dropout)


def _aliases(model: nn.Module, inner: nn.Module) -> dict[str, str]:
    """Map the further names of a parameter, tied or in the wrapped model, to its name."""
    names = {id(p): name for name, p in inner.named_parameters()}
    every = [
        (name, names[id(p)])
        for module in (inner, model)
        for name, p in module.named_parameters(remove_duplicate=False)
        if id(p) in names
    ]
    return {name: canonical for name, canonical in every if name != canonical}
