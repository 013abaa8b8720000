"""Operations that reduce, sort, scan or pool: all they put together must be of one degree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sphereopt.detect.degrees import Call, Degree
from sphereopt.detect.propagate import Propagation, Rule

from . import elementwise


def dims_of(x: Tensor, dim: Any) -> list[int]:
    """Return the dims a reduction goes over; None and an empty list stand for all."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(x.ndim))
    return [d % max(x.ndim, 1) for d in ([dim] if isinstance(dim, int) else dim)] if x.ndim else []


def _dropped(call: Call, dims: list[int]) -> Callable[[Tensor], Tensor]:
    """Return what takes the reduced dims (now of size 1) away, if the call does."""
    if call.keepdim:
        return lambda ids: ids
    return lambda ids: ids.reshape([n for d, n in enumerate(ids.shape) if d not in dims])


def reduce(p: Propagation, call: Call) -> Degree | None:
    """Sums, means, extrema, norms: equal degrees along the dims; these keep an offset there."""
    x = call["self"]
    if call.get("ord", call.get("p", 2)) == 0:  # the 0-norm counts
        return p.freeze(call)
    dims = dims_of(x, call.get("dim"))
    out = _dropped(call, dims)
    degree = p.degree(x)
    if call.op in _KEEP_OFFSET and degree is not None and degree.constant_offsets(dims):
        kept = degree.each(lambda ids: p.along(ids, dims))
        return kept.each(out)
    return Degree(out(p.along(p.ids(x), dims)))


def extremum(p: Propagation, call: Call) -> Any:
    """``max`` and ``min``: over everything, along a dim with indices, or of two tensors."""
    if "other" in call.bound:
        return elementwise.extremum(p, call)
    return [reduce(p, call), None]


def select(p: Propagation, call: Call) -> list[Degree | None]:
    """``topk``, ``sort``, ``kthvalue``, ``median``: compared with each other, so of one degree."""
    x = call["self"]
    dim = call.get("dim", None if call.op == "median" else -1)
    dims = dims_of(x, dim)
    ids = p.along(p.ids(x), dims)
    lost = len(call.shapes[0]) < x.ndim
    kept = [n for d, n in enumerate(ids.shape) if d not in dims]
    return [Degree(ids.reshape(kept) if lost else ids), None]


def indices(p: Propagation, call: Call) -> None:
    """``argmax``, ``argsort``: scale-free if all that is compared scales alike."""
    x = call["self"]
    p.along(p.ids(x), dims_of(x, call.get("dim")))


def scan(p: Propagation, call: Call) -> list[Degree | None]:
    """``cumsum`` and its like."""
    x = call["self"]
    return [Degree(p.along(p.ids(x), dims_of(x, call["dim"]))), None]


def centred(p: Propagation, x: Tensor, dims: list[int]) -> Tensor:
    """Return the one degree along dims of what is left of x after its mean is subtracted."""
    degree = p.degree(x)
    if degree is not None and degree.constant_offsets(dims):
        return p.along(degree.ids, dims)
    return p.along(p.ids(x), dims)


def variance(p: Propagation, call: Call) -> Any:
    """``var``, ``std`` and the two with the mean: an offset constant along the dims is gone."""
    x = call["self"]
    dims = dims_of(x, call.get("dim"))
    out = _dropped(call, dims)
    spread = p.forms.scale(centred(p, x, dims), 2.0 if call.op.startswith("var") else 1.0)
    if len(call.shapes) == 1:
        return Degree(out(spread))
    return [Degree(out(spread)), Degree(out(p.along(p.ids(x), dims)))]


def pool(p: Propagation, call: Call) -> Any:
    """Pooling and interpolation: linear, or a maximum, over a neighbourhood."""
    x = call.args[0]
    dims = list(range(2, x.ndim)) if x.ndim > 2 else list(range(x.ndim))
    if (call.op.endswith("3d") and x.ndim == 4) or (call.op.endswith("2d") and x.ndim == 3):
        dims = list(range(1, x.ndim))  # without a batch
    degree = p.degree(x)
    padded = call.get("padding") or [0]
    # Padding of a maximum is -inf, but a mean counts zeros in, which have no offset.
    whole = "max" in call.op or not any(padded)
    keeps = call.op in _POOLS_KEEPING_OFFSET and whole
    if keeps and degree is not None and degree.constant_offsets(dims):
        return [degree.each(lambda ids: p.along(ids, dims)), None]
    return [Degree(p.along(p.ids(x), dims)), None]


def grid_sample(p: Propagation, call: Call) -> Degree:
    """Interpolate at places that must not depend on the scale."""
    p.zero(p.ids(call.args[1]))
    x = call.args[0]
    return Degree(p.along(p.ids(x), list(range(2, x.ndim))))


def fourier(p: Propagation, call: Call) -> Degree:
    """Discrete Fourier transforms: linear along their dims."""
    x = call["self"]
    return Degree(p.along(p.ids(x), dims_of(x, call["dim"])))


_KEEP_OFFSET = frozenset(["mean", "amax", "amin", "max", "min"])
_POOLS_KEEPING_OFFSET = frozenset(
    f"{kind}{n}d{end}"
    for n in (1, 2, 3)
    for kind, end in (
        ("max_pool", "_with_indices"),
        ("max_pool", ""),
        ("avg_pool", ""),
        ("_adaptive_avg_pool", ""),
        ("adaptive_avg_pool", ""),
        ("adaptive_max_pool", ""),
    )
)
_INTERPOLATIONS = (
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
_ZERO = (
    "softmax _softmax _safe_softmax log_softmax _log_softmax logsumexp logcumsumexp "
    "nll_loss_forward nll_loss2d_forward binary_cross_entropy mse_loss smooth_l1_loss "
    "huber_loss prod cumprod"
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ["sum", "mean", "amax", "amin", "nansum", "linalg_vector_norm", "norm"], reduce
    ),
    **dict.fromkeys(["max", "min"], extremum),
    **dict.fromkeys(["topk", "sort", "kthvalue", "median", "mode"], select),
    **dict.fromkeys(["argmax", "argmin", "argsort"], indices),
    **dict.fromkeys(["cumsum", "cummax", "cummin"], scan),
    **dict.fromkeys(["var", "std", "var_mean", "std_mean"], variance),
    **dict.fromkeys(_ZERO.split(), elementwise.zero),
    **dict.fromkeys([*_POOLS_KEEPING_OFFSET, *_INTERPOLATIONS.split()], pool),
    **dict.fromkeys(["grid_sampler_2d", "grid_sampler_3d"], grid_sample),
    **dict.fromkeys(["_fft_r2c", "_fft_c2r", "_fft_c2c"], fourier),
}
