"""Schemas of aten operations, and the memory that tensors lie on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def plain_name(name: str) -> str:
    """Return the name of an operation without the marks of its variants.

    Example:
        >>> plain_name("add_"), plain_name("view_copy"), plain_name("_to_copy")
        ('add', 'view', '_to_copy')
    """
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    if name.endswith("_copy") and name not in ("_to_copy", "index_copy"):
        name = name.removesuffix("_copy")
    return name


def bind(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included."""
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in schema.arguments), args, strict=False))
    return {**bound, **kwargs}


def tensors_in(out: Any) -> list[Tensor]:
    """Return the tensors in a nest of lists, tuples and dicts."""
    return [o for o in pytree.tree_leaves(out) if isinstance(o, Tensor)]


def storage_of(t: Tensor) -> int | None:
    """Return a number that living tensors have in common if they share memory."""
    try:
        return int(t.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
        return None


def is_whole(t: Tensor) -> bool:
    """Return whether a tensor lies contiguously over all of its storage."""
    nbytes = t.untyped_storage().nbytes()
    return t.is_contiguous() and t.storage_offset() == 0 and t.numel() * t.element_size() == nbytes
