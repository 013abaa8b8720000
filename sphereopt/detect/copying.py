"""Copies of models: unwrapped, gathered, in another dtype, with values or without."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

Sources = dict[str, Tensor]


@final
class _AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm without the check of the input's dimension, in the place of SyncBatchNorm."""

    def _check_input_dim(self, input: Tensor) -> None:
        del input


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, DataParallel and DistributedDataParallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def has_room(model: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether a copy in this dtype fits beside the model, as far as that can be asked."""
    params = list(model.parameters())
    size = sum(p.numel() for p in params) * torch.finfo(dtype).bits // 8
    free = _free_memory(params[0].device) if params else None
    return free is None or size < free


def _free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device, or None if it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        try:  # memory of the page cache is free, too
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
            available = next(line for line in lines if line.startswith("MemAvailable"))
            return int(available.split()[1]) * 1024
        except (OSError, StopIteration):
            return free
    return None


def copied(
    model: nn.Module, dtype: torch.dtype, device: str | None = None
) -> tuple[nn.Module, Sources]:
    """Return a copy that trains, and the values of its parameters.

    Args:
        model: Read, never written. One under ``fully_shard`` is gathered: a collective operation.
        dtype: Of floating-point parameters and buffers.
        device: "meta" for a copy without values.

    Raises:
        TypeError: If the model cannot be copied.
    """
    sources = {name: _full(p) for name, p in model.named_parameters()}
    memo = _memo(model, sources, device)
    try:
        for module in reversed(list(model.modules())):  # inner ones first
            if _is_fsdp(module):
                memo[id(module)] = _unsharded(module, memo)
        twin = memo.get(id(model)) or copy.deepcopy(model, memo)
        twin = twin.to(dtype) if device is None else twin.to(device, dtype)
    except Exception as error:
        raise TypeError(
            f"find_spheres works on a deep copy, and copying {type(model).__name__} failed: {error}"
        ) from error
    _prepare(twin, dtype, training=model.training)
    return twin, sources


def _prepare(twin: nn.Module, dtype: torch.dtype, training: bool) -> None:
    if not training:
        # Mode is the user's where it says something: a norm in eval() inside a model in train() is
        # frozen on purpose. A model that is in eval() as a whole says only that it is not training.
        twin.train()
    for module in twin.modules():
        module._compiled_call_impl = None
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = _AnyBatchNorm  # type: ignore[assignment]
        for name, value in list(vars(module).items()):  # tensors that are not registered as buffers
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(module, name, value.to(dtype))


def _memo(model: nn.Module, sources: Sources, device: str | None) -> dict[int, Any]:
    """Return what deepcopy shall use in the place of some tensors."""
    # Tensors computed by an earlier forward (the older weight_norm keeps its weight) refuse to be
    # copied; the next forward computes them again.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    for name, p in model.named_parameters():
        if device is not None:
            empty = torch.empty_like(sources[name], device=device)
            memo[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
        elif _is_sharded(p):
            memo[id(p)] = nn.Parameter(sources[name].clone(), requires_grad=p.requires_grad)
    return memo


def check(model: nn.Module) -> None:
    """Raise a ValueError if a parameter has no shape yet, or is sharded by something unknown."""
    covered = set(_under_fsdp(model))
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise ValueError(
                f"parameter {name!r} is not initialized; run the model once before find_spheres"
            )
        if _is_sharded(p) and p not in covered:
            raise ValueError(
                f"parameter {name!r} is sharded (DTensor), but not by fully_shard; call "
                "find_spheres before the model is parallelized, the names in the report carry over"
            )
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "the model is wrapped in FullyShardedDataParallel; call find_spheres before "
                "wrapping, the names in the report carry over"
            )


def _is_sharded(p: Tensor) -> bool:
    return hasattr(p, "placements") and hasattr(p, "device_mesh")


def _is_fsdp(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__bases__)


def _under_fsdp(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if _is_fsdp(module):
            yield from module.parameters()


def _full(p: Tensor) -> Tensor:
    """Return all of a parameter: decisions are made on global shapes."""
    full: Tensor = p.full_tensor() if _is_sharded(p) else p  # type: ignore[attr-defined]
    return full.detach()


def _unsharded(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy of a module under ``fully_shard`` as it was before: class and hooks."""
    plain = next(b for b in type(module).__bases__ if b.__name__ != "FSDPModule")
    # What torch's composable APIs keep in a module: process groups, which cannot be copied.
    state = {k: v for k, v in vars(module).items() if not str(k).startswith("__composable_api")}
    for key in ("_forward_hooks", "_forward_pre_hooks"):
        kept = {i: hook for i, hook in state[key].items() if not _of_torch_distributed(hook)}
        for other in (key, f"{key}_with_kwargs", f"{key}_always_called"):
            if other in state:
                items = ((i, value) for i, value in state[other].items() if i in kept)
                state[other] = type(state[other])(items)
    twin: nn.Module = object.__new__(plain)
    vars(twin).update(copy.deepcopy(state, memo))
    return twin


def _of_torch_distributed(hook: Any) -> bool:
    owner = type(getattr(hook, "__self__", hook)).__module__
    return f"{owner} {getattr(hook, '__module__', '')}".find("torch.distributed") >= 0
