"""The first line of a log: what was run, with which options and versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sphereopt.monitor.laws import rule_of
from sphereopt.monitor.schedule import Schedule
from sphereopt.optim._checks import parameter_name

__all__ = ["header"]

FORMAT = 1


def header(
    optimizer: Optimizer,
    schedule: Schedule,
    window: int,
    start: int,
    probes: Iterable[str],
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what a log says of its run before the first row.

    Args:
        optimizer: As the tracker has it, and so are the others.
        schedule: Which steps are logged.
        window: Steps over which the diffusive angle is measured.
        start: Steps made before.
        probes: Names of what is measured.
        config: What the user adds.

    Returns:
        Plain values; no name of the machine or its user.

    Raises:
        TypeError: If ``config`` holds what JSON cannot.
    """
    from sphereopt import __version__

    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise TypeError(f"config={config!r} must be what JSON can hold ({error})") from None
    groups = optimizer.param_groups
    device = next((str(p.device) for group in groups for p in group["params"]), "cpu")
    return {
        "format": FORMAT,
        "sphereopt": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "start": start,
        "every": {str(step): period for step, period in schedule.table.items()},
        "window": window,
        "optimizer": type(optimizer).__name__,
        "rule": rule_of(type(optimizer), groups[0]) if groups else None,
        "device": device,
        "probes": [*probes, *(["diffusive_angle"] if window else [])],
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "groups": [_group(group, index) for index, group in enumerate(groups)],
        "config": {} if config is None else dict(config),
    }


def _group(group: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the options of a group that are plain values, and the names of its parameters."""
    names = [parameter_name(group, index, i) for i in range(len(group["params"]))]
    options = {key: _plain(x) for key, x in group.items() if key not in ("params", "param_names")}
    return {"names": names, "sphere": None, "kind": None} | {
        key: value for key, value in options.items() if key == "sphere" or value is not None
    }


def _plain(value: Any) -> Any:
    """Return an option if JSON can hold it, and None if not."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    return value if isinstance(value, bool | int | float | str) else None
