"""How much each layer amplifies a perturbation of the input, by whose statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sphereopt.diagnostics import _layers, findings
from sphereopt.diagnostics._text import Result, columns, number
from sphereopt.diagnostics._untouched import chosen, inner_model, untouched
from sphereopt.diagnostics.findings import Finding
from sphereopt.products import widened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STATISTICS", "Amplification", "Normalizer", "amplification"]

STATISTICS: tuple[str, ...] = ("batch", "clean", "running")


@final
@dataclass(frozen=True)
class Normalizer:
    """One normalizer, by its first call.

    Attributes:
        name: Its name in the model.
        kind: Name of its class.
        before: Amplification up to its input, by statistics: ``"batch"``, ``"clean"``,
            ``"running"``.
        after: Likewise, up to its output.
        weight: The weight whose output it normalizes, if that is directly before it.
        weight_norm: Its Frobenius norm.
        stale: The clean batch's scale over the running one, median over channels; None without
            running averages. Above 1, ``eval()`` amplifies by it.
    """

    name: str
    kind: str
    before: dict[str, float]
    after: dict[str, float]
    weight: str | None
    weight_norm: float | None
    stale: float | None


@final
@dataclass(frozen=True, repr=False)
class Amplification(Result):
    """What :func:`amplification` measured; ``print`` it for a table.

    Attributes:
        rows: One per normalizer, in the order they ran.
        output: Amplification up to the model's output, by statistics.
        delta: Frobenius norm of the perturbation.
        findings: What stands out.
    """

    rows: tuple[Normalizer, ...]
    output: dict[str, float]
    delta: float
    findings: tuple[Finding, ...]

    def __repr__(self) -> str:
        return f"Amplification({len(self.rows)} normalizers, {len(self.findings)} findings)"

    def __str__(self) -> str:
        sides = [f"{side}, {name}" for side in ("before", "after") for name in STATISTICS]
        rows = [("normalizer", "kind", *sides, "|w|", "stale")]
        for row in self.rows:
            factors = [number(k[name]) for k in (row.before, row.after) for name in STATISTICS]
            ends = number(row.weight_norm), number(row.stale)
            rows.append((row.name or row.kind, row.kind, *factors, *ends))
        outputs = [number(self.output[name]) for name in STATISTICS]
        rows.append(("(output)", "", "", "", "", *outputs, "", ""))
        return "\n".join([*columns(rows, names=2), *(f"! {finding}" for finding in self.findings)])

    def plot(self) -> Figure:
        """Return a matplotlib figure: amplification before and after each normalizer."""
        from sphereopt.diagnostics.drawing import draw_amplification

        return draw_amplification({"": self})


@dataclass
class _Pass:
    """A forward: what went into each normalizer and came out, at its first call."""

    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    last: tuple[str, Tensor] | None = None
    output: Tensor = field(default_factory=lambda: torch.empty(0))


def amplification(
    model: nn.Module,
    x: Tensor,
    delta: Tensor | Callable[[nn.Module, Tensor], Tensor],
    *,
    normalizers: Callable[[nn.Module], bool] = _layers.is_normalizer,
) -> Amplification:
    r"""Measure how much a perturbation of the input has grown before and after each normalizer.

    .. math::
        \kappa_l = \frac{|f_l(x+\delta)-f_l(x)|}{|\delta|}

    (Frobenius norms over the batch), three times: normalizers that average over the batch use

    * ``"batch"``: each batch's own statistics, those of x for x and those of x + delta for
      x + delta, as in ``train()``;
    * ``"clean"``: the statistics of x for both;
    * ``"running"``: the running averages for both, as in ``eval()``.

    All other modules are in ``eval()``: without dropout, f is one function. For normalizers without
    running averages the three differ only by what comes before them.

    Args:
        model: Any module that takes one tensor. It is left as found.
        x: Clean inputs, shape (N, ...), of floating point.
        delta: Perturbation, x's shape; or a function (model, x) that returns the attacked batch,
            such as ``lambda m, x: pgd(m, x, y, 0.03)``, called once, in ``eval()``.
        normalizers: Whether a module is one: torch's, and leaf modules named ``...Norm...``.

    Returns:
        Per normalizer the factors, the norm of the weight before it, and how stale its running
        averages are; the factors of the output; findings in words.

    Raises:
        TypeError: If x is not of floating point.
        ValueError: If there is no normalizer, the perturbation is zero or of another shape.

    Notes:
        If a weight w in front of a normalizer grows to c w, the perturbation before it grows by c,
        and after it does not grow, provided that the statistics are those of the grown weight:
        ``"batch"`` and ``"clean"``. By running averages of the smaller weight it grows by c too.
        The paper's argument that growing weights amplify attacks thus holds before a normalizer,
        behind stale averages, and where no normalizer follows. Needs the memory of the normalizers'
        inputs and outputs of one batch, three times.

    References:
        New Interpretations of Normalization Methods in Deep Learning, Sun et al., 2020.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.rand(64, 4)
        >>> bn = amplification(model, x, 0.01 * torch.randn(64, 4)).rows[0]
        >>> _ = model[0].weight.data.mul_(10)
        >>> grown = amplification(model, x, 0.01 * torch.randn(64, 4)).rows[0]
        >>> [round(grown.before[s] / bn.before[s]) for s in ("batch", "clean", "running")]
        [10, 10, 10]
        >>> [round(grown.after[s] / bn.after[s]) for s in ("batch", "clean", "running")]
        [1, 1, 10]
    """
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; perturbations need inputs of floating point")
    inner = inner_model(model)
    names = {m: name for name, m in inner.named_modules() if normalizers(m)}
    if not names:
        raise ValueError(f"{type(inner).__name__} has no normalizer; say what is one: normalizers=")
    moved = _moved(inner, x, delta)
    size = _distance(moved, x)
    if not size > 0:
        raise ValueError("the perturbation is zero; amplification is a ratio to its size")
    factors: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], Tensor]] = {}
    with untouched(inner), torch.no_grad():
        clean, factors["running"] = _ratios(inner, names, x, moved, size, "running")
        ran = list(clean.before)
        stale = _adopt(inner, names, x)
        _, factors["clean"] = _ratios(inner, names, x, moved, size, "clean")
        # Last, since it moves the running averages.
        _, factors["batch"] = _ratios(inner, names, x, moved, size, "batch")
    rows = _rows(inner, names, ran, clean.source, factors, stale)
    output = {s: factors[s][2].item() for s in STATISTICS}
    return Amplification(rows, output, size.item(), findings.of_amplification(rows))


def _moved(
    model: nn.Module, x: Tensor, delta: Tensor | Callable[[nn.Module, Tensor], Tensor]
) -> Tensor:
    if isinstance(delta, Tensor):
        given = delta
    else:
        with untouched(model):
            given = delta(model.eval(), x.detach().clone())
    if given.shape != x.shape:
        raise ValueError(
            f"delta has shape {tuple(given.shape)} and x {tuple(x.shape)}; they must agree"
        )
    moved: Tensor = x + given if isinstance(delta, Tensor) else given
    return moved.detach()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm(widened(a) - widened(b))
    return distance


def _ratios(
    model: nn.Module,
    names: dict[nn.Module, str],
    x: Tensor,
    moved: Tensor,
    size: Tensor,
    statistics: str,
) -> tuple[_Pass, tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]:
    """Return the clean pass, and the factors before and after each normalizer and at the end."""
    model.eval()
    if statistics == "batch":
        for module in names:
            module.train()
    clean, attacked = _run(model, names, x), _run(model, names, moved)
    before = {k: _distance(attacked.before[k], v) / size for k, v in clean.before.items()}
    after = {k: _distance(attacked.after[k], v) / size for k, v in clean.after.items()}
    return clean, (before, after, _distance(attacked.output, clean.output) / size)


def _first(values: Any) -> Tensor:
    return next(t for t in pytree.tree_leaves(values) if isinstance(t, Tensor))


def _run(model: nn.Module, names: dict[nn.Module, str], x: Tensor) -> _Pass:
    found = _Pass()
    weights = {m: name for name, m in model.named_modules() if _layers.role(m) == "weights"}

    def enter(module: nn.Module, args: Any) -> None:
        name = names[module]
        if name not in found.before:
            value = _first(args)
            if found.last is not None and found.last[1] is value:
                found.source[name] = found.last[0]
            found.before[name] = value.clone()  # an activation may come, in place

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        found.after.setdefault(names[module], _first(output).clone())

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        found.last = (weights[module], _first(output))

    handles = [m.register_forward_pre_hook(enter) for m in names]
    handles += [m.register_forward_hook(leave) for m in names]
    handles += [m.register_forward_hook(remember) for m in weights]
    try:
        parts = chosen(model(x.clone()))
        found.output = torch.cat([part.flatten() for part in parts])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _adopt(model: nn.Module, names: dict[nn.Module, str], x: Tensor) -> dict[str, Tensor]:
    """Make the batch's statistics the running ones; return how the scales changed, by name."""
    model.eval()
    scales: dict[nn.Module, dict[str, Tensor]] = {}
    for module in names:
        if hasattr(module, "num_batches_tracked"):
            module.train()
            module.momentum = 1.0  # type: ignore[assignment]
            buffers = module.named_buffers(recurse=False)
            scales[module] = {k: b.clone() for k, b in buffers if b.is_floating_point()}
    per_channel = {names[m]: values.shape for m, values in _inputs(model, names, x).items()}
    stale: dict[str, Tensor] = {}
    for module, before in scales.items():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in before or names[module] not in per_channel:
                continue
            shape = per_channel[names[module]]
            if key == "running_var" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                # torch keeps the unbiased variance, and normalizes by the biased one.
                count = shape.numel() // shape[1]
                buffer.mul_((count - 1) / count)
            if "var" in key or "scale" in key:
                eps = getattr(module, "eps", 0.0) if "var" in key else 0.0
                ratio = (buffer + eps) / (before[key] + eps)
                stale[names[module]] = (ratio.sqrt() if "var" in key else ratio).median()
    return stale


def _inputs(model: nn.Module, names: dict[nn.Module, str], x: Tensor) -> dict[nn.Module, Tensor]:
    by_name = {name: module for module, name in names.items()}
    return {by_name[name]: value for name, value in _run(model, names, x).before.items()}


def _rows(
    model: nn.Module,
    names: dict[nn.Module, str],
    ran: list[str],
    source: dict[str, str],
    factors: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], Tensor]],
    stale: dict[str, Tensor],
) -> tuple[Normalizer, ...]:
    kinds = {name: type(module).__name__ for module, name in names.items()}
    rows = []
    for name in ran:
        before = {s: factors[s][0][name].item() for s in STATISTICS}
        after = {s: factors[s][1][name].item() for s in STATISTICS}
        weight, norm = None, None
        if name in source:
            weight, norm = _weight(model, source[name])
        lag = stale[name].item() if name in stale else None
        rows.append(Normalizer(name, kinds[name], before, after, weight, norm, lag))
    return tuple(rows)


def _weight(model: nn.Module, name: str) -> tuple[str, float] | tuple[None, None]:
    value = getattr(model.get_submodule(name), "weight", None)
    if not isinstance(value, Tensor):
        return None, None
    norm = torch.linalg.vector_norm(widened(value.detach()))
    return f"{name}.weight" if name else "weight", norm.item()
