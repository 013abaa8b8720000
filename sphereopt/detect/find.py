"""``find_spheres``: which weights of a model are scale-invariant, and at which granularity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import certify as cert
from . import euler
from .ideal import TINY_EPS
from .report import Evidence, Finding, SphereReport
from .twin import NotFiniteError, Twin, hash_seed, preserved_rng, unwrap

PROBES = 3
# Tried in turn: a model that overflows at the usual generic point may not nearer to its weights.
_SPREADS = (0.1, 0.01, 0.001)


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

    With ``p = w * df/dw``, a set S of entries is such a sphere only if ``sum_S p = 0`` (Euler). The
    sums are taken over rows, columns, blocks and whole tensors, in float64, with the normalization
    eps removed, at three random points near the weights; the finest partition that passes is then
    certified by rescaling all spheres and comparing outputs. The answer holds for the *training*
    function, on what the example input exercises.

    Args:
        model: any module; it, its gradients, buffers and modes and all random number generators are
            left exactly as found. A model in ``eval()`` is analysed as if in ``train()``; a norm
            layer in ``eval()`` inside a model in ``train()`` counts as frozen.
        args: positional inputs as a tuple, or a single tensor. The batch needs several values per
            normalized channel, like any training batch.
        kwargs: keyword inputs.
        loss: maps the model's output to what is trained, for losses that normalise or that penalise
            weights. Called in float64; a penalty may refer to the parameters of ``model``.
        output: selects what counts as the function instead, for example ``lambda out: out[0]``.
            Without either: the output's "loss", else "logits", else "last_hidden_state", else every
            floating-point tensor in it.
        seed: for the random points, cotangents and factors.

    Returns:
        A mapping from parameter name to finding: the sphere ("row", "col", "block:K", "tensor") or
        ``None``, the measurements, the reason. One-dimensional parameters never get a sphere.

    Raises:
        TypeError: if ``args`` is neither tuple nor tensor, or the model cannot be copied.
        ValueError: if a parameter is uninitialized, on the meta device or sharded; if the example
            batch has one value per normalized channel; if outputs are not finite, not there, or do
            not depend on the parameters; if both ``loss`` and ``output`` are given.

    Notes:
        This is numerical evidence, not proof: a kink beyond 1000 times the activations seen stays
        unnoticed. With its real eps no weight is exactly invariant; ``evidence.at_real_eps`` says
        how far from it this one is. Weight and bias that are invariant only jointly (before
        LayerNorm) are not reported. Needs about 8 bytes per parameter, and activations in float64.

    References:
        * Norm matters: efficient and accurate normalization schemes in deep networks (Hoffer,
          Banner, Golan, Soudry, 2018), equation 1, https://arxiv.org/abs/1803.01814
        * Spherical perspective on learning with normalization layers (Roburin et al., 2022),
          https://arxiv.org/abs/2006.13382

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sphereopt.detect import find_spheres
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
        >>> find_spheres(model, torch.randn(16, 8)).spheres
        {'0.weight': 'row'}
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
    with preserved_rng(), torch.inference_mode(False), torch.enable_grad():
        twin = Twin(inner, inputs, kwargs or {}, output if loss is None else loss)
        findings = _findings(twin, inner, seed)
    return SphereReport({f.name: f for f in findings}, _aliases(model, inner))


def _findings(twin: Twin, model: nn.Module, seed: int) -> list[Finding]:
    # The user's own point comes first: what is wrong with the inputs shows here, undisguised.
    twin.place(None)
    real = euler.take_probe(twin, hash_seed(seed, "real"), eps=None)
    probes, spread = _generic_probes(twin, seed)
    drafts = [_judge(name, p, probes) for name, p in model.named_parameters()]
    claims = {f.name: f.sphere for f in drafts if f.sphere is not None}
    certificate = cert.certify(twin, claims, hash_seed(seed, "certificate"), spread)
    return [_settled(draft, certificate, real) for draft in drafts]


def _generic_probes(twin: Twin, seed: int) -> tuple[list[euler.Probe], float]:
    for spread in _SPREADS:
        try:
            return [_probe(twin, hash_seed(seed, str(i)), spread, i) for i in range(PROBES)], spread
        except NotFiniteError:
            continue
    raise NotFiniteError(
        "the model's outputs are finite at its weights but not next to them; is a parameter at the "
        "edge of its domain (a variance near zero, say), or the model unstable?"
    )


def _probe(twin: Twin, seed: int, spread: float, index: int) -> euler.Probe:
    twin.place(seed, spread)
    # Dropout hides signal but belongs to the training function: Linear with bias -> Dropout ->
    # BatchNorm is invariant without the mask only. So the last probe drops, the others observe.
    return euler.take_probe(twin, seed, eps=TINY_EPS, dropout=index == PROBES - 1)


def _judge(name: str, p: Tensor, probes: Sequence[euler.Probe]) -> Finding:
    """Pick the finest partition that passes Euler's test."""
    shape = tuple(p.shape)
    if not p.is_floating_point():
        return Finding(name, shape, None, None, f"not a floating-point parameter ({p.dtype})")
    whole = euler.read(probes, name, shape, "tensor")
    if not whole.seen.any():
        reason = (
            "inert: the outputs do not depend on it (unused, cancelled by a norm, or no gradient)"
        )
        return Finding(name, shape, None, None, reason)
    for spec in euler.candidates(shape):
        reading = euler.read(probes, name, shape, spec)
        if reading.worst > euler.TOLERANCE:
            continue
        n, unseen = len(reading.seen), int((~reading.seen).sum())
        evidence = Evidence(reading.worst, None, None, len(probes))
        if unseen:
            unit = {"row": "rows", "col": "columns"}.get(spec, "blocks")
            reason = (
                f"not certified: {unseen} of {n} {unit} were never exercised by the example input"
            )
            return Finding(name, shape, None, evidence, reason)
        spheres = "one sphere" if n == 1 else f"{n} spheres"
        reason = f"scale-invariant: {spheres} of {p.numel() // n} entries"
        hidden = int((~euler.read(probes, name, shape, "row").seen).sum())
        if hidden:
            reason += f" ({hidden} of {shape[0]} rows were never exercised)"
        return Finding(name, shape, spec, evidence, reason)
    evidence = Evidence(whole.worst, None, None, len(probes))
    return Finding(name, shape, None, evidence, _why_not(p, whole.worst))


def _why_not(p: Tensor, c: float) -> str:
    invariant = c <= euler.TOLERANCE
    if p.numel() == 1:
        return "a single entry: it has no direction"
    if p.ndim < 2:
        state = "though numerically invariant as a whole" if invariant else "and not invariant"
        return f"a gain or bias ({p.ndim}-d), {state}"
    return "its norm matters: the gradient has a radial part"


def _settled(draft: Finding, certificate: cert.Certificate, real: euler.Probe) -> Finding:
    """Add the certificate's verdict and the measurement at the real eps."""
    if draft.sphere is None or draft.evidence is None:
        return draft
    error = certificate.refuted.get(draft.name)
    if error is not None:
        reason = (
            f"refuted: rescaling by {draft.sphere} changes the outputs by {error:.1e} of their "
            "size, but no gradient shows it (a kink out of reach, or a scale that leaves autograd)"
        )
        evidence = replace(draft.evidence, rescaling=error)
        return replace(draft, sphere=None, evidence=evidence, reason=reason)
    reading = euler.read([real], draft.name, draft.shape, draft.sphere)
    evidence = replace(
        draft.evidence,
        rescaling=certificate.joint,
        at_real_eps=reading.worst if reading.seen.any() else None,
    )
    return replace(draft, evidence=evidence)


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
