"""A copy of the model, in float64 where that fits, on which detection may do what it likes."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .copying import copied
from .ideal import IdealArithmetic, Precision, eps_attributes

Choose = Callable[[Any], Any]
# The function of a model that returns several things, most specific first.
_OUTPUT_KEYS = ("loss", "logits", "last_hidden_state")
# Dropout keeps at least half: a head with p=0.999 would blank the network for the probe.
_MOST_DROPOUT = 0.5


class NotFiniteError(ValueError):
    """The outputs contain inf or NaN."""


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Put every random number generator back as it was found: torch, its devices, random, numpy."""
    cpu = torch.get_rng_state()
    devices = [(backend, backend.get_rng_state_all()) for backend in _backends()]
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002  models use the legacy one
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        for backend, states in devices:
            backend.set_rng_state_all(states)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def _backends() -> list[Any]:
    # A device that is not in use stays so: asking for its state would start it, and so
    # torch.manual_seed, which leaves a seed behind for the day it starts, is not called either.
    backends: list[Any] = [torch.cuda, torch.xpu]
    return [backend for backend in backends if backend.is_initialized()]


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    for backend in _backends():
        backend.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  models use the legacy generator


@final
class Twin:
    """The copy, the inputs, and what counts as the function.

    Args:
        model: the unwrapped model; it is read, never written.
        args: positional inputs.
        kwargs: keyword inputs.
        choose: maps the model's output to the tensors that count as the function, or ``None``.
        precision: dtype of the copy.
        device: "meta" for a copy without values, or ``None`` to stay where the model is.

    Attributes:
        precision: the same.
        module: the copy; every floating-point parameter requires grad.
        params: its distinct floating-point parameters by name.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        choose: Choose | None,
        precision: Precision,
        device: str | None = None,
    ) -> None:
        self.precision = precision
        self._device = device
        self.module, self._source = copied(model, precision.dtype, device)
        self.params = {n: p for n, p in self.module.named_parameters() if p.is_floating_point()}
        for p in self.params.values():
            p.requires_grad_(True)
        self._sizes: dict[str, float] = {}
        originals = {n: p for n, p in model.named_parameters() if n in self.params}
        self._twins = {id(p): self.params[n] for n, p in originals.items()}
        self._inputs = pytree.tree_map_only(Tensor, self._detached, (tuple(args), dict(kwargs)))
        # A loss module may hold class weights, which must be of that dtype as well.
        self._choose = choose
        if isinstance(choose, nn.Module):
            self._choose = copy.deepcopy(choose).to(device or None, precision.dtype)
        self._eps = eps_attributes(self.module)
        self._dropouts = [
            m
            for m in self.module.modules()
            if isinstance(m, nn.modules.dropout._DropoutNd) and m.training
        ]
        for dropout in self._dropouts:
            dropout.p = min(dropout.p, _MOST_DROPOUT)
        self._buffers = [
            (module, name, buffer.clone())
            for module in self.module.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def place(
        self, seed: int | None, spread: float = 0.1, names: Iterable[str] | None = None
    ) -> None:
        """Set parameters to the user's weights (``seed=None``) or to a generic point near them.

        Zero-initialised gains, gates, heads and biases fake invariance at a real initialization. A
        point drawn from a density around it does not, with probability 1: the noise is ``spread``
        times the tensor's rms or its natural size (1 or fan_in**-0.5), whichever is larger.
        """
        with torch.no_grad():
            for name in self.params if names is None else names:
                p = self.params[name].copy_(self._source[name])
                if seed is not None and p.numel():
                    # Seeded by name, so that one can be put back without drawing the others.
                    gen = torch.Generator().manual_seed(hash_seed(seed, name))
                    # Uniform float32 of unit variance: any density does, and this is the cheapest.
                    noise = torch.empty(p.shape, dtype=torch.float32)
                    noise.uniform_(-(3**0.5), 3**0.5, generator=gen)
                    p.add_(noise.to(p.device), alpha=spread * self._size(name))

    def _size(self, name: str) -> float:
        """Return the rms of the user's weight, or its natural size where that is larger."""
        if name not in self._sizes:
            w = self._source[name].detach()
            natural = (w.numel() / w.shape[0]) ** -0.5 if w.ndim > 1 else 1.0
            wide = torch.promote_types(w.dtype, torch.float32)
            rms = float(w.norm(dtype=wide)) / w.numel() ** 0.5
            self._sizes[name] = max(rms, natural)
        return self._sizes[name]

    @contextmanager
    def session(
        self,
        seed: int,
        *,
        eps: float | None,
        dropout: bool = False,
        on_escape: Callable[[Tensor], None] | None = None,
    ) -> Iterator[None]:
        """Enter the conditions of one forward and its backward: fresh buffers, RNG, arithmetic.

        Args:
            seed: for whatever randomness the model has; equal seeds make runs comparable.
            eps: the normalization eps, or ``None`` for the model's own.
            dropout: whether dropout modules drop.
            on_escape: called with tensors whose values leave torch.
        """
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer.clone()
        for module, name, value in self._eps:
            setattr(module, name, value if eps is None else eps)
        for module in self._dropouts:
            module.train(dropout)
        _seed_all(seed)
        with ExitStack() as stack:
            stack.enter_context(_default_dtype(self.precision.dtype))
            for device in {p.device.type for p in self.params.values()} - {"meta"}:
                stack.enter_context(torch.autocast(device, enabled=False))
            if "torch._dynamo" in sys.modules:  # compiled parts run as they are written
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            # Backward on other threads would miss the mode below (activation checkpointing).
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            arithmetic = IdealArithmetic(self.precision.dtype, eps, self._twins, on_escape)
            stack.enter_context(arithmetic)
            yield

    def tensors(self) -> Iterator[Tensor]:
        """Yield what the copy holds: parameters, buffers, and tensors kept as plain attributes."""
        yield from self.module.parameters()
        for module in self.module.modules():
            kept = (*module._buffers.values(), *vars(module).values())
            yield from (value for value in kept if isinstance(value, Tensor))

    def _detached(self, t: Tensor) -> Tensor:
        t = t.detach() if self._device is None else t.detach().to(self._device)
        return t.to(self.precision.dtype) if t.is_floating_point() else t

    def fresh_inputs(self) -> Any:
        """Return a copy of (args, kwargs), which the model may write to."""
        return pytree.tree_map_only(Tensor, Tensor.clone, self._inputs)

    def outputs(self, inputs: Any = None) -> list[Tensor]:
        """Run the copy once, inside a ``session``, and return the tensors that count.

        Args:
            inputs: (args, kwargs) to use, by default fresh ones.

        Raises:
            ValueError: if there are none, or (with values of its own) they are not finite.
        """
        args, kwargs = self.fresh_inputs() if inputs is None else inputs
        try:
            out = self.module(*args, **kwargs)
            chosen = main_output(out) if self._choose is None else self._choose(out)
        except (RuntimeError, ValueError, TypeError) as error:
            if "Expected more than 1" in str(error):
                raise ValueError(
                    "the example input gives a normalization layer one value per channel, so there "
                    f"is no variance to divide by ({error}); pass a larger example batch"
                ) from error
            error.add_note(
                f"raised while running a {self.precision.dtype} copy of the model in find_spheres"
            )
            raise
        tensors = [t for t in pytree.tree_leaves(chosen) if isinstance(t, Tensor)]
        tensors = [t for t in tensors if t.is_floating_point()]
        if not tensors:
            raise ValueError(
                f"the model's output ({type(out).__name__}) has no floating-point tensor; pass "
                "output=, a function that selects the tensors that count"
            )
        # Inputs from elsewhere belong to the proof, which must not see this question asked.
        if inputs is None and not all(bool(t.isfinite().all()) for t in tensors):
            raise NotFiniteError("the model's outputs contain inf or NaN on the example input")
        return tensors


def drawn_by_python() -> object:
    """Return something that changes when ``random`` or numpy's legacy generator is drawn from."""
    state = np.random.get_state()  # noqa: NPY002  models use the legacy one
    return random.getstate(), state[1].tobytes(), state[2]  # type: ignore[index]


def hash_seed(seed: int, name: str) -> int:
    """Return a seed that is a fixed function of both arguments (``hash(str)`` is not)."""
    value = seed % 2**31
    for byte in name.encode():
        value = (value * 1_000_003 + byte + 1) % (2**61 - 1)
    return value


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main_output(out: Any) -> Any:
    """Return what counts as a model's function: its loss, logits or hidden state, or all of it."""
    if dataclasses.is_dataclass(out) and not isinstance(out, type | Mapping):
        out = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    if isinstance(out, Mapping):
        for key in _OUTPUT_KEYS:
            if out.get(key) is not None:
                return out[key]
        return dict(out)
    return out
