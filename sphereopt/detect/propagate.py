"""Degrees of homogeneity of every tensor of a run, propagated while the model runs.

Nothing is traced ahead of time: a dispatch mode sees each aten operation with its actual tensors,
whatever Python did to get there, and asks the rule of that operation for the degrees of the
results. Operations without a rule, and values that leave the graph, must have degree zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from .degrees import Call, Degree, Offset, aligned
from .forms import ANY, ZERO, Forms, Origin, compressed, joined, representative
from .schema import bind, is_whole, plain_name, storage_of, tensors_in

# Structural zeros (padding, masks) of constants are looked for up to this size.
_LOOKED_AT = 1 << 22

Rule = Callable[["Propagation", "Call"], Any]


@final
class Propagation(TorchDispatchMode):
    """The mode; see the module.

    Args:
        rules: Operation name -> rule.
        moving: Operations that only move entries: they exercise nothing.

    Attributes:
        forms: The forms and the equations.
        seen: Ids of forms that some operation other than a move has used.
        operations: How many operations have run.
        used_at: Unit -> number of the first operation that used it.
        looked_up: Units of tables that an embedding selects from.
        failures: What rules did not expect.
        random_path: Whether Python read a number that was drawn at random: another draw may run
            other operations.
    """

    def __init__(self, rules: Mapping[str, Rule], moving: Collection[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.forms = Forms()
        self.seen: set[int] = set()
        self.operations = 0
        self.used_at: dict[int, int] = {}
        self.looked_up: set[int] = set()
        self.failures: list[str] = []
        self.random_path = False
        self._rules = rules
        self._moving = frozenset(moving)
        self._degrees: MutableMapping[Tensor, Degree] = _by_tensor()
        # Tensors whose zeros are accidents of the input.
        self._data: MutableMapping[Tensor, bool] = _by_tensor()
        self._random: MutableMapping[Tensor, bool] = _by_tensor()
        self._views: dict[int, list[weakref.ref[Tensor]]] = {}
        self._module: list[str] = []
        self._op = ""
        self._labels = 1

    # What rules use.

    @property
    def origin(self) -> Origin:
        """The operation at hand."""
        return Origin(self._op, self._module[-1] if self._module else "")

    def degree(self, t: Tensor) -> Degree | None:
        """Return what is known of a tensor; None for a constant."""
        return self._degrees.get(t)

    def ids(self, t: Tensor, ndim: int | None = None) -> Tensor:
        """Return the degrees of a tensor's entries, settling its offsets.

        Args:
            t: Any tensor; a constant has degree zero, and any where it is 0 or infinite.
            ndim: Pad with leading dims up to this number, to broadcast.
        """
        found = self.degree(t)
        if found is None:
            ids = self._constant(t)
        else:
            ids = self.settled(found)
            self._degrees[t] = Degree(ids)
        return ids if ndim is None else aligned(ids, ndim)

    def settled(self, degree: Degree) -> Tensor:
        """Ask that all summands be of one degree, and return it."""
        ids = degree.ids
        for offset in degree.offsets:
            ids = self.agreed(ids, offset.ids)
        return ids

    def _constant(self, t: Tensor) -> Tensor:
        readable = t.is_floating_point() and not t.is_meta and 0 < t.numel() <= _LOOKED_AT
        if readable and t not in self._data:
            none = (t == 0) | t.isinf()
            if bool(none.any()):
                return compressed(torch.where(none.cpu(), ANY, ZERO))
        return torch.full([1] * t.ndim, ZERO)

    def zero(self, ids: Tensor) -> None:
        """Ask for degree zero."""
        self.forms.demand_zero(ids, self.origin)

    def equal(self, a: Tensor, b: Tensor) -> None:
        """Ask for equal degrees."""
        self.forms.demand_equal(a, b, self.origin)

    def agreed(self, a: Tensor, b: Tensor) -> Tensor:
        """Ask for equal degrees and return them, broadcast."""
        self.equal(a, b)
        return joined(a, b)

    def along(self, ids: Tensor, dims: list[int]) -> Tensor:
        """Ask for equal degrees along dims; return one per line, the dims kept."""
        for dim in dims:
            if ids.shape[dim] > 1:
                one = representative(ids, dim)
                self.equal(ids, one)
                ids = one
        return ids

    def freeze(self, call: Call) -> Degree | None:
        """Ask for degree zero of every input; return that the result is then a constant."""
        for t in call.tensors:
            self.zero(self.ids(t))
        return None

    def say(self, op: str) -> None:
        """Give the operation at hand a name for readers."""
        self._op = op

    def fresh_labels(self, shape: list[int]) -> Tensor:
        """Return labels, all different and never used before."""
        n = torch.Size(shape).numel()
        self._labels += n
        return torch.arange(self._labels - n, self._labels).reshape(shape)

    def relabelled(self, degree: Degree) -> Degree:
        """Return the degree of a multiple: the offsets keep their pattern, not their values."""
        offsets = []
        for ids, labels in degree.offsets:
            distinct, pattern = torch.unique(labels, return_inverse=True)
            offsets.append(Offset(ids, pattern + self._labels))
            self._labels += len(distinct)
        return Degree(degree.ids, tuple(offsets))

    def set(self, t: Tensor, degree: Degree | None) -> None:
        """Record what is known of a tensor."""
        if degree is None:
            self._degrees.pop(t, None)
        else:
            self._degrees[t] = degree.each(compressed)

    def mark_data(self, t: Tensor) -> None:
        """Say that zeros of this tensor are accidents: another batch or another weight has none."""
        self._data[t] = True

    def escape(self, t: Tensor) -> None:
        """Ask for degree zero of a tensor whose values leave torch (numpy, tolist)."""
        with _disable_current_modes():
            if self.degree(t) is not None:
                self._op = "a value that leaves torch"
                self.zero(self.ids(t))

    def demand_no_degree(self, outputs: list[Tensor]) -> None:
        """Ask for degree zero of what counts as the function."""
        self._op = "output"
        self._note_use(outputs)
        for t in outputs:
            self.zero(self.ids(t))

    # The run.

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """Keep track of the module that runs, for ``origin``."""

        def leave(*_: object) -> None:
            if self._module:
                self._module.pop()

        handles = []
        for name, module in model.named_modules():

            def enter(_: nn.Module, __: object, name: str = name) -> None:
                self._module.append(name)

            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._module.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        live = any(t in self._degrees for t in inputs)
        schema = func._schema
        self.operations += 1
        self._op = plain_name(schema.name.partition("::")[2])
        if self._op in _READ and any(t in self._random for t in inputs):
            self.random_path = True
        if live and self._op not in self._moving:
            self._note_use(inputs)
        if not schema.is_mutable or any(r.alias_info is None for r in schema.returns):
            out = func(*args, **kwargs)
            results = tensors_in(out)
            if live:
                call = self._call(func, args, kwargs, [o.shape for o in results])
                for o, degree in zip(results, self._apply(call, len(results)), strict=True):
                    self.set(o, degree)
            self._track(results, inputs)
            return out
        return self._in_place(func, args, kwargs, inputs, live)

    def _in_place(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, inputs: list[Tensor], live: bool
    ) -> Any:
        """Run an operation that returns what it writes to; rules see what was there before."""
        bound = bind(func._schema, args, kwargs)
        written = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        targets = tensors_in([bound[name] for name in written])
        degrees: list[Degree | None] = [None] * len(targets)
        if live:
            call = self._call(func, args, kwargs, [t.shape for t in targets])
            degrees = self._apply(call, len(targets))
        out = func(*args, **kwargs)
        for t, degree in zip(targets, degrees, strict=True):
            self._overwrite(t, degree)
        self._track(tensors_in(out), inputs)
        if any(t in self._data for t in inputs):
            for t in targets:
                for alias in self._aliases(t):
                    self.mark_data(alias)
        return out

    def _call(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, shapes: list[torch.Size]
    ) -> Call:
        return Call(self._op, func, bind(func._schema, args, kwargs), args, kwargs, shapes)

    def _apply(self, call: Call, count: int) -> list[Degree | None]:
        rule = self._rules.get(call.op)
        if rule is None:
            self.say(f"{call.op}, an operation without a rule,")
            self.freeze(call)
            return [None] * count
        try:
            result = rule(self, call)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as e:
            # A use of the operation that its rule was not made for costs this proof, not the run.
            self.failures.append(f"the rule of {call.op} failed: {e}")
            self.say(f"{call.op}, used as no rule expects,")
            self.freeze(call)
            return [None] * count
        results = list(result) if isinstance(result, list | tuple) else [result]
        return (results + [None] * count)[:count]

    def _note_use(self, inputs: list[Tensor]) -> None:
        used: set[int] = set()
        for t in inputs:
            degree = self.degree(t)
            if degree is not None:
                for ids in (degree.ids, *(o.ids for o in degree.offsets)):
                    used.update(torch.unique(ids).tolist())
        for x in used - self.seen:
            for unit, _ in self.forms.table[x]:
                self.used_at.setdefault(unit, self.operations)
        self.seen |= used

    def _track(self, results: list[Tensor], inputs: list[Tensor]) -> None:
        fresh = self._op in _STRUCTURAL
        random = self._op in _RANDOM or any(t in self._random for t in inputs)
        data = random or (not fresh and any(t in self._data for t in inputs))
        for o in results:
            if random:
                self._random[o] = True
            if data:
                self.mark_data(o)
        # Inputs as well: a view of a buffer, when it is written to, changes the buffer.
        for t in [*results, *inputs]:
            key = storage_of(t)
            if key is not None:
                refs = self._views.setdefault(key, [])
                refs[:] = [r for r in refs if r() is not None]
                if not any(r() is t for r in refs):
                    refs.append(weakref.ref(t))

    def _aliases(self, t: Tensor) -> list[Tensor]:
        """Return the living tensors on the storage of ``t``, itself first."""
        key = storage_of(t)
        others = [r() for r in self._views.get(key, [])] if key is not None else []
        return [t, *(o for o in others if o is not None and o is not t)]

    def _overwrite(self, t: Tensor, degree: Degree | None) -> None:
        """Record new degrees of ``t`` and of every view that shares its memory."""
        aliases = self._aliases(t)
        known = [o for o in aliases if o in self._degrees]
        self.set(t, degree)
        if len(aliases) == 1 or (degree is None and not known):
            return
        whole = next((o for o in aliases if is_whole(o)), None)
        if whole is None:
            # No tensor to keep the books on: nothing on this memory may have a degree.
            for o in aliases:
                self.zero(self.ids(o))
                self.set(o, None)
            return
        new = self.ids(t).expand(t.shape)
        book = self.ids(whole).expand(whole.shape).clone(memory_format=torch.contiguous_format)
        book.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(new)
        for o in aliases:
            self.set(o, Degree(book.as_strided(o.shape, o.stride(), o.storage_offset())))


def _by_tensor() -> Any:
    """Return a mapping that does not keep its keys alive."""
    return WeakTensorKeyDictionary()


# Results whose zeros do not depend on any input.
_STRUCTURAL = frozenset(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty".split()  # noqa: SIM905
)
_READ = frozenset(["_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"])
_RANDOM = frozenset(
    "bernoulli rand randn rand_like randn_like uniform normal exponential random multinomial "  # noqa: SIM905
    "native_dropout geometric log_normal cauchy".split()
)
