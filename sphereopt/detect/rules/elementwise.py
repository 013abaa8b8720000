"""Operations on each entry by itself."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sphereopt.detect.degrees import Call, Degree, Offset, aligned
from sphereopt.detect.ideal import TINY_EPS
from sphereopt.detect.propagate import Propagation, Rule


def same(p: Propagation, call: Call) -> Degree:
    """Functions with f(c*x) = c*f(x) for c > 0."""
    return Degree(p.ids(call.args[0]))


def _multiple(p: Propagation, x: Tensor) -> Degree | None:
    degree = p.degree(x)
    return None if degree is None else p.relabelled(degree)


def linear(p: Propagation, call: Call) -> Degree | None:
    """Negation: it keeps an offset an offset."""
    return _multiple(p, call.args[0])


def zero(p: Propagation, call: Call) -> None:
    """Functions that are not homogeneous: their inputs must have degree zero."""
    p.freeze(call)


def shape_only(p: Propagation, call: Call) -> None:
    """The result does not depend on the values."""


def draw(p: Propagation, call: Call) -> Degree | None:
    """Random numbers: of degree zero, and so must be the tensors that say how they are spread."""
    for name in ("p", "mean", "std"):
        if isinstance(call.get(name), Tensor):
            p.zero(p.ids(call[name]))
    if call.op == "bernoulli" and "p" not in call.bound:
        p.zero(p.ids(call["self"]))
    return None


def scale_free(p: Propagation, call: Call) -> None:
    """The result, a sign say, depends on the values but not on their scale."""
    for t in call.tensors:
        p.ids(t)


def compare(p: Propagation, call: Call) -> None:
    """Compare with 0 or an infinity, or with what scales alike."""
    x, y = call["self"], call["other"]
    if isinstance(y, Tensor):
        ndim = len(call.shapes[0])
        p.equal(p.ids(x, ndim), p.ids(y, ndim))
    elif y != 0 and not math.isinf(y):
        p.zero(p.ids(x))


def power(p: Propagation, call: Call, exponent: float | None = None) -> Degree | None:
    """``x**k`` has k times the degree."""
    x, k = call.args[0], call.get("exponent") if exponent is None else exponent
    if not isinstance(x, Tensor) or isinstance(k, Tensor) or not _exact(p, x, float(k)):
        return p.freeze(call)
    return Degree(p.forms.scale(p.ids(x), float(k)))


def _exact(p: Propagation, x: Tensor, k: float) -> bool:
    """Return whether k times the degree is dyadic, as the cube root of a cube is: then exact."""
    if not k * 2**20 % 1:
        return True
    units = (unit for i in torch.unique(p.ids(x)).tolist() for unit in p.forms.table[i])
    return all(not times * k * 2**20 % 1 for _, times in units)


def add(p: Propagation, call: Call) -> Degree | None:
    """Sums and differences: equal degrees, or an offset."""
    x, y = call["self"], call["other"]
    ndim = len(call.shapes[0])
    if not isinstance(y, Tensor):
        if _negligible(y):
            return p.degree(x) if call.op == "add" else _multiple(p, x)
        y = torch.tensor(float(y))
    dx, dy = (p.degree(t) or Degree(p.ids(t)) for t in (x, y))
    dx, dy = (d.each(lambda t: aligned(t, ndim)) for d in (dx, dy))
    if call.op in ("sub", "rsub") and call["alpha"] == 1 and _cancels(dx, dy):
        return Degree(p.agreed(dx.ids, dy.ids))
    if call.op != "add" or call["alpha"] != 1:
        dx, dy = p.relabelled(dx), p.relabelled(dy)  # their offsets enter as multiples
    if not _agree(dx.ids, dy.ids):
        for big, small, degree, other in ((x, y, dx, dy), (y, x, dy, dx)):
            own = list(aligned(small, ndim).shape)
            if big.shape == call.shapes[0] != torch.Size(own) and not other.offsets:
                # Constant along a dim at least: an offset.
                offset = Offset(other.ids.expand(own), p.fresh_labels(own))
                return Degree(degree.ids, (*degree.offsets, offset))
    return Degree(p.agreed(dx.ids, dy.ids), dx.offsets + dy.offsets)


def _negligible(value: Any) -> bool:
    """Return whether a number is 0 or the eps of a norm, which IdealArithmetic has made tiny."""
    if isinstance(value, Tensor):
        if value.ndim or value.is_meta or value.requires_grad:
            return False
        value = value.item()
    return bool(abs(value) <= TINY_EPS)


def _agree(a: Tensor, b: Tensor) -> bool:
    return bool((a == b).all())


def _cancels(dx: Degree, dy: Degree) -> bool:
    """Return whether both have the same offsets, as y and y.mean() have."""
    if not dx.offsets or len(dx.offsets) != len(dy.offsets):
        return False
    pairs = zip(dx.offsets, dy.offsets, strict=True)
    return all(_agree(a.labels, b.labels) for a, b in pairs)


def extremum(p: Propagation, call: Call) -> Degree:
    """Elementwise maximum or minimum: of equals."""
    ndim = len(call.shapes[0])
    a, b = p.ids(call["self"], ndim), p.ids(call["other"], ndim)
    return Degree(p.agreed(a, b))


def multiply(p: Propagation, call: Call, sign: float) -> Degree | None:
    """Products and quotients: degrees add."""
    x, y = call["self"], call["other"]
    if call.get("rounding_mode"):
        return p.freeze(call)
    if not isinstance(y, Tensor) or (y.ndim == 0 and p.degree(y) is None):
        return _multiple(p, x)
    ndim = len(call.shapes[0])
    dx, dy = (p.degree(t) or Degree(p.ids(t)) for t in (x, y))
    if dx.offsets and not dy.offsets:
        return _scaled(p, dx, y, ndim, sign)
    if dy.offsets and not dx.offsets and sign == 1.0:
        return _scaled(p, dy, x, ndim, sign)
    return Degree(p.forms.add(p.ids(x, ndim), p.ids(y, ndim), sign))


def _scaled(p: Propagation, degree: Degree, factor: Tensor, ndim: int, sign: float) -> Degree:
    """Return the degree of a product: an offset stays one, constant where the factor is, too."""
    by, own = p.ids(factor, ndim), aligned(factor, ndim).shape
    offsets = []
    for ids, labels in degree.each(lambda t: aligned(t, ndim)).offsets:
        shape = [max(n, m) for n, m in zip(labels.shape, own, strict=True)]
        product = p.forms.add(ids, by, sign)
        offsets.append(Offset(product.expand(shape), p.fresh_labels(shape)))
    return Degree(p.forms.add(aligned(degree.ids, ndim), by, sign), tuple(offsets))


def fused_multiply_add(p: Propagation, call: Call, sign: float) -> Degree:
    """``self + value * tensor1 * tensor2``, or the quotient."""
    ndim = len(call.shapes[0])
    a, b, c = (p.ids(call[key], ndim) for key in ("self", "tensor1", "tensor2"))
    product = p.forms.add(b, c, sign)
    return Degree(p.agreed(a, product))


def lerp(p: Propagation, call: Call) -> Degree:
    """Weighted mean: of unequal degrees, as in a running average, none, should anything read it."""
    shape = list(call.shapes[0])
    a, end = p.ids(call["self"], len(shape)), call["end"]
    if isinstance(call["weight"], Tensor):
        p.zero(p.ids(call["weight"]))
    b = (p.degree(end) or Degree(p.ids(end))).each(lambda t: aligned(t, len(shape)))
    if not b.offsets and _agree(a, b.ids):
        return Degree(p.agreed(a, b.ids))
    # Summands without a common pattern: nothing is asked of them unless the average is used.
    apart = (b.ids, *(offset.ids for offset in b.offsets))
    return Degree(a, tuple(Offset(ids.expand(shape), p.fresh_labels(shape)) for ids in apart))


def clamp(p: Propagation, call: Call) -> Degree | None:
    """Bounds at 0 or infinity keep the degree; so does the eps of a norm, which tends to 0."""
    x = call["self"]
    names = ("min", "max", "min_val", "max_val")
    for bound in (call.bound[name] for name in names if name in call.bound):
        if bound is None or _negligible(bound):
            continue
        if isinstance(bound, Tensor):
            ndim = len(call.shapes[0])
            p.equal(p.ids(x, ndim), p.ids(bound, ndim))
        elif not math.isinf(bound):
            return p.freeze(call)
    return Degree(p.ids(x))


def threshold(p: Propagation, call: Call) -> Degree | None:
    """ReLU as ``threshold(x, 0, 0)``."""
    if call["threshold"] == 0 and call["value"] == 0:
        return Degree(p.ids(call["self"]))
    return p.freeze(call)


def where(p: Propagation, call: Call) -> Degree | None:
    """Choose between equals."""
    if "other" not in call.bound:
        scale_free(p, call)  # the indices of what is not zero
        return None
    ndim = len(call.shapes[0])
    a, b = p.ids(call["self"], ndim), p.ids(call["other"], ndim)
    return Degree(p.agreed(a, b))


def masked_fill(p: Propagation, call: Call) -> Degree | None:
    """Fill with 0 or infinity, or with what has degree zero."""
    value = call["value"]
    ids = p.ids(call["self"], len(call.shapes[0]))
    if isinstance(value, Tensor):
        other = p.ids(value, ids.ndim)
        return Degree(p.agreed(ids, other))
    if value != 0 and not math.isinf(value):
        p.zero(ids)
        return None
    return Degree(ids)


def prelu(p: Propagation, call: Call) -> Degree:
    """PReLU: the slope must have degree zero."""
    slope = call.args[1]
    p.zero(p.ids(slope))
    return Degree(p.ids(call.args[0]))


def gated(p: Propagation, call: Call) -> Degree:
    """GLU: the first half times a sigmoid of the second."""
    x, dim = call["self"], call["dim"]
    ids = p.ids(x)
    half = x.shape[dim] // 2
    if ids.shape[dim] == 1:
        p.zero(ids)
        return Degree(ids)
    p.zero(ids.narrow(dim, half, half))
    return Degree(ids.narrow(dim, 0, half))


def pairs(p: Propagation, call: Call) -> Degree:
    """Two numbers to a complex one, or back: ``view_as_complex``, ``view_as_real``, ``complex``."""
    if call.op == "complex":
        a, b = (p.ids(call[k], len(call.shapes[0])) for k in ("real", "imag"))
        return Degree(p.agreed(a, b))
    ids = p.ids(call["self"])
    if call.op == "view_as_real":
        return Degree(ids.unsqueeze(-1))
    return Degree(p.along(ids, [ids.ndim - 1]).squeeze(-1))


_SAME = "relu abs leaky_relu rrelu_with_noise real imag"
_LINEAR = "neg negative _neg_view conj _conj"
#: Not homogeneous. They are named so that a reader sees that they were thought of; an operation
#: that is in no table is treated alike.
_ZERO = (
    "exp exp2 expm1 log log2 log10 log1p sigmoid tanh gelu silu mish erf erfc sin cos tan sinh "
    "cosh atan asin acos softplus elu celu selu hardsigmoid hardswish logit log_sigmoid_forward "
    "round floor ceil trunc frac logaddexp atan2 remainder fmod bucketize searchsorted "
    "_local_scalar_dense item histc bincount"
)
_SHAPE_ONLY = (
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty "
    "new_full size sym_size is_same_size isnan isinf isfinite"
)
_DRAWS = "bernoulli normal uniform exponential random randint_like geometric log_normal cauchy"
_SCALE_FREE = "sign sgn signbit logical_not logical_and logical_or logical_xor nonzero is_nonzero"


def _multiply(sign: float) -> Rule:
    return partial(multiply, sign=sign)


def _power(exponent: float) -> Rule:
    return partial(power, exponent=exponent)


RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), same),
    **dict.fromkeys(_LINEAR.split(), linear),
    **dict.fromkeys(_ZERO.split(), zero),
    **dict.fromkeys(_SHAPE_ONLY.split(), shape_only),
    **dict.fromkeys(_DRAWS.split(), draw),
    **dict.fromkeys(_SCALE_FREE.split(), scale_free),
    **dict.fromkeys(["gt", "lt", "ge", "le", "eq", "ne"], compare),
    **dict.fromkeys(["add", "sub", "rsub"], add),
    **dict.fromkeys(["maximum", "minimum", "fmax", "fmin"], extremum),
    **dict.fromkeys(["mul", "multiply"], _multiply(1.0)),
    **dict.fromkeys(["div", "divide", "true_divide"], _multiply(-1.0)),
    "addcmul": partial(fused_multiply_add, sign=1.0),
    "addcdiv": partial(fused_multiply_add, sign=-1.0),
    "lerp": lerp,
    "pow": power,
    "square": _power(2.0),
    "sqrt": _power(0.5),
    "rsqrt": _power(-0.5),
    "reciprocal": _power(-1.0),
    **dict.fromkeys(["clamp", "clamp_min", "clamp_max", "clip", "hardtanh"], clamp),
    "threshold": threshold,
    "where": where,
    "glu": gated,
    "masked_fill": masked_fill,
    **dict.fromkeys(["prelu", "_prelu_kernel"], prelu),
    **dict.fromkeys(["native_dropout", "_fused_dropout"], same),
    **dict.fromkeys(["view_as_real", "view_as_complex", "complex"], pairs),
}
