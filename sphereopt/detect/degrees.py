"""Degrees of homogeneity of a tensor, and the operation that is about to use them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Offset(NamedTuple):
    """A summand of its own degree, such as a bias.

    Attributes:
        ids: Its degrees, of size 1 along dims on which they are constant.
        labels: Entries with equal labels have equal values.
    """

    ids: Tensor
    labels: Tensor

    def constant(self, dims: Iterable[int]) -> bool:
        """Return whether the values are constant along these dims."""
        return all(self.labels.shape[d] == 1 for d in dims)


@final
@dataclass(frozen=True, slots=True)
class Degree:
    """The degrees of the entries of a tensor ``h + o1 + o2 + ...``.

    The sum has a degree only if all summands have the same. But an offset that is constant along a
    dim is gone after that dim's mean is subtracted; so the decision is put off until an operation
    asks for the degree of the sum (``Propagation.ids``).

    Attributes:
        ids: Degrees of h, of size 1 along dims on which they are constant.
        offsets: The other summands.
    """

    ids: Tensor
    offsets: tuple[Offset, ...] = ()

    def each(self, move: Callable[[Tensor], Tensor]) -> Degree:
        """Return the degree with ``move`` applied to all its tensors."""
        offsets = tuple(Offset(move(o.ids), move(o.labels)) for o in self.offsets)
        return Degree(move(self.ids), offsets)

    def constant_offsets(self, dims: Iterable[int]) -> bool:
        """Return whether there are offsets, all of them constant along these dims."""
        dims = list(dims)
        return bool(self.offsets) and all(o.constant(dims) for o in self.offsets)


@final
@dataclass(frozen=True, slots=True)
class Call:
    """One aten operation.

    Attributes:
        op: Its name, without the underscore of in-place variants.
        func: The overload that was called.
        bound: Its arguments by the schema's names, defaults included.
        args: Its arguments as they were given.
        kwargs: Likewise.
        shapes: Shapes of the tensors it returns.
    """

    op: str
    func: Any
    bound: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: list[torch.Size]

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument that only some overloads have."""
        return self.bound.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    @property
    def keepdim(self) -> bool:
        """Whether a reduction kept its dims."""
        return bool(self.bound.get("keepdim", False))


def aligned(ids: Tensor, ndim: int) -> Tensor:
    """Return the tensor with leading dims of size 1 up to ``ndim``."""
    return ids if ids.ndim >= ndim else ids.reshape([1] * (ndim - ids.ndim) + list(ids.shape))
