"""Operations that move entries: done to the degrees themselves, whatever they do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sphereopt.detect.degrees import Call, Degree, Offset, aligned
from sphereopt.detect.forms import ANY, ZERO
from sphereopt.detect.propagate import Propagation, Rule


def move(p: Propagation, call: Call) -> Any:
    """Views, gathers, rolls: the first argument's degrees, moved likewise."""
    source: Tensor = call.args[0]
    degree = p.degree(source)
    if degree is None or any(isinstance(a, torch.dtype) for a in call.args[1:]):
        return p.freeze(call)  # an index of some degree, or the bits read as another type
    if not degree.offsets and degree.ids.numel() == 1:
        return [Degree(degree.ids.reshape([1] * len(shape))) for shape in call.shapes]
    if any(t.is_meta for t in call.tensors[1:]):  # an index without values
        ids = p.along(p.ids(source), list(range(source.ndim)))
        return [Degree(ids.reshape([1] * len(shape))) for shape in call.shapes]

    def moved(ids: Tensor) -> list[Tensor]:
        args = [a.cpu() if isinstance(a, Tensor) else a for a in call.args[1:]]
        args = [
            [i.cpu() if isinstance(i, Tensor) else i for i in a] if isinstance(a, list) else a
            for a in args
        ]
        return _several(call, ids.expand(source.shape), args)

    parts_of_h = moved(degree.ids)
    offsets = [zip(moved(o.ids), moved(o.labels), strict=True) for o in degree.offsets]
    parts = zip(*offsets, strict=True) if offsets else [()] * len(parts_of_h)
    both = zip(parts_of_h, parts, strict=True)
    return [Degree(x, tuple(Offset(*o) for o in own)) for x, own in both]


def _several(call: Call, ids: Tensor, args: list[Any]) -> list[Tensor]:
    func = torch.ops.aten.reshape.default if call.op in _VIEWS else call.func
    out = func(ids, *args, **call.kwargs)
    return list(out) if isinstance(out, list | tuple) else [out]


def as_strided(p: Propagation, call: Call) -> Degree | None:
    """Other strides over the memory of a view: done to a book of degrees of the same layout."""
    x = call["self"]
    start = call["storage_offset"]
    start = 0 if start is None else start - x.storage_offset()
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    book = torch.full((span,), -1)
    book.as_strided(x.shape, x.stride(), 0).copy_(p.ids(x).expand(x.shape))
    reach = sum((n - 1) * s for n, s in zip(call["size"], call["stride"], strict=True))
    if start < 0 or start + reach >= span:
        return p.freeze(call)
    ids = book.as_strided(call["size"], call["stride"], start).clone()
    # Memory between the entries of x: nothing is known of it.
    return p.freeze(call) if bool((ids < 0).any()) else Degree(ids)


def keep(p: Propagation, call: Call) -> Degree | None:
    """The same entries."""
    return p.degree(call.args[0])


def cast(p: Propagation, call: Call) -> Degree | None:
    """The same entries, unless they are rounded to integers."""
    dtype = call.get("dtype")
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        return p.freeze(call)
    return p.degree(call["self"])


def copy(p: Propagation, call: Call) -> Degree | None:
    """``self[...] = src``."""
    degree = p.degree(call["src"])
    ndim = len(call.shapes[0])
    if degree is None:
        return Degree(p.ids(call["src"], ndim))
    return degree.each(lambda x: aligned(x, ndim))


def fill(p: Propagation, call: Call) -> Degree:
    """``self[...] = value``."""
    value = call.get("value", 0.0)
    ndim = len(call.shapes[0])
    if isinstance(value, Tensor):
        return Degree(p.ids(value, ndim))
    return Degree(torch.full([1] * ndim, _of_number(value)))


def _of_number(value: float) -> int:
    return ANY if value == 0 or math.isinf(value) else ZERO


def pad(p: Propagation, call: Call) -> Degree:
    """Pad with a constant."""
    x = call["self"]
    ids = p.ids(x).expand(x.shape)
    return Degree(torch.constant_pad_nd(ids, call["pad"], _of_number(call.get("value", 0))))


def in_floats(p: Propagation, call: Call) -> Degree:
    """Moves whose kernels take floating point only."""
    ids = p.ids(call.args[0]).expand(call.args[0].shape)
    return Degree(call.func(ids.double(), *call.args[1:], **call.kwargs).long())


def triangle(p: Propagation, call: Call) -> Degree:
    """``tril`` and ``triu``: zeros, of any degree, in the place of what is cut off."""
    ids = p.ids(call["self"])
    if ids.numel() == 1:
        return Degree(ids)
    return Degree(call.func(ids.expand(call["self"].shape), *call.args[1:], **call.kwargs))


def embedding(p: Propagation, call: Call) -> Degree:
    """Rows looked up."""
    weight, index = call["weight"], call["indices"]
    ids = p.ids(weight)
    p.looked_up |= p.forms.units_in(torch.unique(ids).tolist())
    if ids.shape[0] == 1:
        return Degree(ids.reshape([1] * index.ndim + [ids.shape[1]]))
    if index.is_meta:
        return Degree(p.along(ids, [0]).reshape([1] * index.ndim + [ids.shape[1]]))
    return Degree(ids[index.cpu()])


def embedding_bag(p: Propagation, call: Call) -> list[Degree | None]:
    """Rows looked up and reduced by the bag: all of one degree."""
    weights = call.get("per_sample_weights")
    if weights is not None:
        p.zero(p.ids(weights))
    ids = p.along(p.ids(call["weight"]), [0])
    return [Degree(ids)]


def join(p: Propagation, call: Call) -> Degree:
    """``cat``."""
    tensors = [t for t in call["tensors"] if t.numel() or t.ndim > 1]
    dim = call["dim"] % max(tensors[0].ndim, 1)
    sizes = [t.shape[dim] for t in tensors]

    def joined_up(parts: list[Tensor]) -> Tensor:
        # The other dims stay of size 1 where they are so in all.
        shape = [max(x.shape[d] for x in parts) for d in range(parts[0].ndim)]
        full = (
            x.expand(*shape[:dim], n, *shape[dim + 1 :]) for x, n in zip(parts, sizes, strict=True)
        )
        return torch.cat(list(full), dim)

    return _together(p, tensors, joined_up)


def _together(
    p: Propagation, tensors: list[Tensor], put: Callable[[list[Tensor]], Tensor]
) -> Degree:
    """Return the degree of several tensors put into one; what has no offset has one that is 0."""
    degrees = [p.degree(t) or Degree(p.ids(t)) for t in tensors]
    offsets = []
    for i in range(max(len(degree.offsets) for degree in degrees)):
        own = [
            degree.offsets[i] if i < len(degree.offsets) else _no_offset(p, t.ndim)
            for degree, t in zip(degrees, tensors, strict=True)
        ]
        offsets.append(Offset(put([o.ids for o in own]), put([o.labels for o in own])))
    return Degree(put([degree.ids for degree in degrees]), tuple(offsets))


def _no_offset(p: Propagation, ndim: int) -> Offset:
    one = [1] * ndim
    return Offset(torch.full(one, ANY), p.fresh_labels(one))


def stack(p: Propagation, call: Call) -> Degree:
    """``stack``."""
    dim = call["dim"] % len(call.shapes[0])
    shape = call["tensors"][0].shape
    return _together(
        p, call["tensors"], lambda parts: torch.stack([x.expand(shape) for x in parts], dim)
    )


def write(p: Propagation, call: Call) -> Degree:
    """``index_add``, ``scatter`` and the like: a source comes to some places along one dim."""
    target = call["self"]
    source = next(call[name] for name in ("source", "src", "value") if name in call.bound)
    dim = call["dim"] % max(target.ndim, 1)
    before = p.along(p.ids(target), [dim]) if target.ndim else p.ids(target)
    new = _ids_of(p, source, target.ndim)
    new = p.along(new, [dim]) if target.ndim else new
    return Degree(p.agreed(before, new))


def _ids_of(p: Propagation, value: Any, ndim: int) -> Tensor:
    if isinstance(value, Tensor):
        return p.ids(value, ndim)
    return torch.full([1] * ndim, _of_number(float(value)))


def write_anywhere(p: Propagation, call: Call) -> Degree:
    """``index_put``, ``masked_scatter``: one degree for all entries, old and new."""
    target = call["self"]
    source = call.get("values", call.get("source"))
    before = p.along(p.ids(target), list(range(target.ndim)))
    new = p.along(p.ids(source), list(range(source.ndim)))
    new = new.reshape([1] * target.ndim)
    return Degree(p.agreed(before, new))


def slice_scatter(p: Propagation, call: Call) -> Degree:
    """Replace a slice."""
    target, source = call["self"], call["src"]
    ids = p.ids(target).expand(target.shape).contiguous()
    return Degree(call.func(ids, p.ids(source).expand(source.shape), *call.args[2:], **call.kwargs))


_VIEWS = frozenset(["view", "_unsafe_view", "reshape", "_reshape_alias"])
_MOVES = (
    "view _unsafe_view reshape _reshape_alias permute transpose t expand squeeze unsqueeze slice "
    "select index index_select gather roll flip repeat unfold narrow expand_as view_as diagonal "
    "take_along_dim movedim flatten unflatten swapaxes rot90 tile channel_shuffle "
    "split split_with_sizes unbind chunk unsafe_split mT repeat_interleave masked_select "
    "unsafe_chunk diag_embed"
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES.split(), move),
    **dict.fromkeys(
        ["clone", "detach", "alias", "contiguous", "lift", "lift_fresh", "positive"], keep
    ),
    **dict.fromkeys(["_to_copy", "to"], cast),
    **dict.fromkeys(["resolve_conj", "resolve_neg"], keep),
    "as_strided": as_strided,
    "copy": copy,
    "fill": fill,
    "zero": fill,
    "constant_pad_nd": pad,
    **dict.fromkeys(
        [
            *["im2col", "pixel_shuffle", "pixel_unshuffle", "native_channel_shuffle"],
            *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
        ],
        in_floats,
    ),
    **dict.fromkeys(["tril", "triu"], triangle),
    "embedding": embedding,
    **dict.fromkeys(["_embedding_bag", "_embedding_bag_forward_only"], embedding_bag),
    **dict.fromkeys(["cat", "concat"], join),
    "stack": stack,
    **dict.fromkeys(["index_add", "index_copy", "index_reduce", "scatter", "scatter_add"], write),
    "scatter_reduce": write,
    **dict.fromkeys(
        ["index_put", "_index_put_impl", "_unsafe_index_put", "masked_scatter"], write_anywhere
    ),
    **dict.fromkeys(["slice_scatter", "select_scatter"], slice_scatter),
}
