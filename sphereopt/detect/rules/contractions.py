"""Matrix products and convolutions: sums of products, all of one degree along what is summed."""

from __future__ import annotations

import torch
from torch import Tensor

from sphereopt.detect.degrees import Call, Degree, Offset, aligned
from sphereopt.detect.forms import ZERO, representative
from sphereopt.detect.propagate import Propagation, Rule


def contract(p: Propagation, a: Tensor, b: Tensor) -> Tensor:
    """Return the degrees of ``sum_k x[..., i, k] * y[..., k, j]``.

    ``a[i, k] + b[k, j]`` must not depend on k. Written as differences to one k, that is asked for
    in O(i*k + k*j) equations.
    """
    forms = p.forms
    if a.shape[-1] == 1 and b.shape[-2] == 1:
        return forms.add(a, b)
    a0, b0 = representative(a, -1), representative(b, -2)
    da, db = forms.add(a, a0, -1.0), forms.add(b, b0, -1.0)
    ra, rb = representative(da, -2), representative(db, -1)
    p.equal(da, ra)
    p.equal(db, rb)
    p.zero(forms.add(ra.transpose(-1, -2), rb))
    return forms.add(a0, b0)


def with_bias(p: Propagation, degree: Degree, bias: Tensor, shape: torch.Size, dim: int) -> Degree:
    """Return the degree after adding a bias along ``dim``: it is an offset, constant elsewhere."""
    own = [shape[d] if d == dim else 1 for d in range(len(shape))]
    o = p.ids(bias).reshape([-1 if d == dim else 1 for d in range(len(shape))])
    if bool((degree.ids == o).all()):
        return degree
    offset = Offset(o.expand(own), p.fresh_labels(own))
    return Degree(degree.ids, (*degree.offsets, offset))


def product(p: Propagation, x: Tensor, y: Tensor) -> Degree:
    """``x @ y``; offsets of x that are the same for all its rows stay offsets."""
    degree = p.degree(x)
    if degree is None or not degree.constant_offsets([x.ndim - 2]):
        return Degree(contract(p, p.ids(x), p.ids(y)))
    b = p.ids(y)
    offsets = []
    for offset in degree.offsets:
        ids = contract(p, offset.ids, b)
        batch = offset.labels[..., 0, 0].expand(y.shape[:-2]).shape
        own = [*batch, 1, y.shape[-1]]
        offsets.append(Offset(ids.expand(own), p.fresh_labels(own)))
    return Degree(contract(p, degree.ids, b), tuple(offsets))


def matmul(p: Propagation, call: Call) -> Degree:
    """``mm`` and ``bmm``."""
    return product(p, call["self"], call.get("mat2"))


def addmm(p: Propagation, call: Call) -> Degree:
    """``beta*self + alpha*x@y``."""
    bias, shape = call["self"], call.shapes[0]
    x, y = (call["mat1"], call["mat2"]) if call.op == "addmm" else (call["batch1"], call["batch2"])
    degree = product(p, x, y)
    if call["beta"] == 0:
        return degree
    if bias.ndim == 1 and bias.shape[0] == shape[-1]:
        return with_bias(p, degree, bias, shape, len(shape) - 1)
    ids, other = p.settled(degree), p.ids(bias, len(shape))
    return Degree(p.agreed(ids, other))


def addmv(p: Propagation, call: Call) -> Degree:
    """``mv`` and ``addmv``."""
    x, v = (call["self"], call["vec"]) if call.op == "mv" else (call["mat"], call["vec"])
    out = contract(p, p.ids(x), p.ids(v).unsqueeze(-1)).squeeze(-1)
    if call.op == "mv" or call["beta"] == 0:
        return Degree(out)
    other = p.ids(call["self"], 1)
    return Degree(p.agreed(out, other))


def dot(p: Propagation, call: Call) -> Degree:
    """Inner product of two vectors."""
    x, y = call.args[:2]
    return Degree(contract(p, p.ids(x).unsqueeze(0), p.ids(y).unsqueeze(1)).reshape([]))


def outer(p: Propagation, call: Call) -> Degree:
    """Outer product."""
    x, y = call["self"], call["vec2"]
    return Degree(p.forms.add(p.ids(x).unsqueeze(1), p.ids(y).unsqueeze(0)))


def trilinear(p: Propagation, call: Call) -> Degree:
    """``nn.Bilinear``: products of three, broadcast, then summed."""
    product = torch.full([1], ZERO)
    for number in (1, 2, 3):
        ids = p.ids(call[f"i{number}"])
        for dim in call[f"expand{number}"]:
            ids = ids.unsqueeze(dim)
        product = ids if number == 1 else p.forms.add(product, ids)
    dims = sorted(d % product.ndim for d in call["sumdim"])
    summed = p.along(product, dims)
    return Degree(summed.reshape([n for d, n in enumerate(summed.shape) if d not in dims]))


def grouped_mm(p: Propagation, call: Call) -> Degree:
    """One product per expert, on consecutive runs of rows: every expert of one degree."""
    x, y = call["self"], call["mat2"]
    a = p.along(p.ids(x), list(range(x.ndim - 1)))
    b = p.along(p.ids(y), list(range(y.ndim - 2)))
    out = contract(p, aligned(a, 3)[0], aligned(b, 3)[0])
    return Degree(aligned(out, len(call.shapes[0])))


def convolution(p: Propagation, call: Call) -> Degree:
    """Convolutions of all kinds: contractions over the input channels of a group."""
    x, w, bias = call["input"], call["weight"], call["bias"]
    groups, transposed = call["groups"], call.get("transposed", False)
    spatial = list(range(2, x.ndim))
    kernel = p.along(p.ids(w), spatial).flatten(1)
    b = _by_group(kernel, w, groups, transposed)
    shape = call.shapes[0]
    degree = p.degree(x) or Degree(p.ids(x))
    if not degree.constant_offsets([0, *spatial]) or any(call["padding"]) or transposed:
        degree = Degree(p.settled(degree))  # the rim of the image sees less of an offset

    def through(ids: Tensor) -> Tensor:
        return _convolved(p, p.along(ids, spatial), b, groups, shape)

    own = [1, shape[1], *[1] * len(spatial)]
    offsets = (Offset(through(o.ids).expand(own), p.fresh_labels(own)) for o in degree.offsets)
    result = Degree(through(degree.ids), tuple(offsets))
    return result if bias is None else with_bias(p, result, bias, shape, 1)


def _by_group(kernel: Tensor, w: Tensor, groups: int, transposed: bool) -> Tensor:
    """Return kernel degrees (dim 0, dim 1) as (group, in, out)."""
    if transposed:  # (in, out / groups)
        full = kernel.expand(w.shape[0] if kernel.shape[0] > 1 else 1, kernel.shape[1])
        return full.reshape(groups if full.shape[0] > 1 else 1, -1, full.shape[1])
    # (out, in / groups)
    return kernel.reshape(groups if kernel.shape[0] > 1 else 1, -1, kernel.shape[1]).transpose(1, 2)


def _convolved(p: Propagation, ids: Tensor, b: Tensor, groups: int, shape: torch.Size) -> Tensor:
    """Contract (n, channels, 1...) with (group, in, out)."""
    n, channels = ids.shape[0], ids.shape[1]
    a = ids.reshape(n, groups, -1).transpose(0, 1) if channels > 1 else ids.reshape(1, n, 1)
    out = contract(p, a, b)  # (group, n, out)
    if out.shape[0] > 1 or out.shape[2] > 1:
        out = out.expand(groups, out.shape[1], shape[1] // groups)
    flat = out.transpose(0, 1).reshape(out.shape[1], -1)
    return flat.reshape(*flat.shape, *[1] * (len(shape) - 2))


def attention(p: Propagation, call: Call) -> list[Degree | None]:
    """Fused attention: scores of degree zero, values of one degree along the keys."""
    q, k, v = (call[name] for name in ("query", "key", "value"))
    p.zero(contract(p, p.ids(q), p.ids(k).transpose(-1, -2)))
    mask = call.get("attn_mask", call.get("attn_bias"))
    if isinstance(mask, Tensor):
        p.zero(p.ids(mask))
    return [Degree(p.along(p.ids(v), [v.ndim - 2]))]


_CONVOLUTIONS = "convolution _convolution mkldnn_convolution convolution_overrideable"
_ATTENTIONS = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(["mm", "bmm"], matmul),
    **dict.fromkeys(["addmm", "baddbmm"], addmm),
    **dict.fromkeys(["mv", "addmv"], addmv),
    **dict.fromkeys(["dot", "vdot"], dot),
    "ger": outer,
    "_grouped_mm": grouped_mm,
    "_trilinear": trilinear,
    **dict.fromkeys(_CONVOLUTIONS.split(), convolution),
    **dict.fromkeys(_ATTENTIONS.split(), attention),
}

__all__ = ["RULES", "contract", "with_bias"]
