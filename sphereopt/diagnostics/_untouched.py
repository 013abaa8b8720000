"""Running a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sphereopt.detect.copying import unwrap
from sphereopt.detect.twin import main_output, preserved_rng

__all__ = ["as_inputs", "chosen", "inner_model", "untouched"]


def inner_model(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and ``torch.compile``.

    Raises:
        TypeError: If it is no module.
        ValueError: If a parameter has no values yet, or none on this machine.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    inner = unwrap(model)
    for name, p in inner.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} is uninitialized; run one batch through the model"
            )
        if p.is_meta:
            raise ValueError(f"parameter {name!r} of shape {tuple(p.shape)} is on the meta device")
    return inner


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run on copies of the buffers; put modes, attributes of modules and random generators back.

    Compiled parts run as they were written: hooks do not reach into compiled code.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    registered = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    try:
        with (
            preserved_rng(),
            torch.inference_mode(False),
            torch.compiler.set_stance("force_eager"),
        ):
            # Copies in their place: a backward that is still to come may need the buffers
            # themselves, and would refuse them if they were written to and written back.
            copies = {id(b): b.detach().clone() for b in model.buffers()}
            for now, before in registered:
                now.update({key: copies[id(b)] for key, b in before.items() if b is not None})
            yield
    finally:
        for module, values in attributes:
            vars(module).clear()
            vars(module).update(values)
        for now, before in registered:
            now.clear()
            now.update(before)


def as_inputs(
    args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None, grad: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return copies of a model's inputs, so that nothing in place reaches the caller's.

    Args:
        args: Positional inputs as a tuple, or a single tensor.
        kwargs: Keyword inputs.
        grad: Let gradients flow to inputs of floating point.

    Raises:
        TypeError: If ``args`` is neither tuple nor tensor.
    """
    if not isinstance(args, tuple | Tensor):
        raise TypeError(
            f"args is a {type(args).__name__}; pass positional inputs as a tuple, args=(x,), or "
            "keyword inputs as kwargs="
        )

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if grad and value.is_floating_point():
            # The clone is no leaf, so that a model may begin in place.
            return value.requires_grad_().clone()
        return value.clone()

    inputs = (args,) if isinstance(args, Tensor) else args
    positional: tuple[Any, ...] = pytree.tree_map(copy, inputs)
    named: dict[str, Any] = pytree.tree_map(copy, dict(kwargs or {}))
    return positional, named


def chosen(output: Any) -> list[Tensor]:
    """Return the tensors that stand for an output: loss, logits, hidden state, or all floats."""
    leaves = pytree.tree_leaves(main_output(output))
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
