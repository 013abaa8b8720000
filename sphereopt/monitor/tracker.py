"""The tracker: norms and angles of every sphere, from the numbers a step already has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sphereopt import products, spheres
from sphereopt.monitor.jsonl import JsonlSink
from sphereopt.monitor.probes import PROBES
from sphereopt.moves import _root
from sphereopt.optim._checks import parameter_name, units
from sphereopt.optim.base import Reading, SphereOptimizer
from sphereopt.radius import Travel

__all__ = ["QUANTILES", "Tracker", "track"]

Row = dict[str, Any]

#: The quantiles of each probe over the spheres of a parameter.
QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}


class Tracker:
    """Log norm, angle, effective lr, relative update and radial share of every sphere.

    Attaches through torch's step hooks. On steps that are not logged it does nothing. On logged
    ones it reads the inner products that one of our optimizers has computed anyway; for any other
    optimizer it copies the weights of groups with a ``sphere`` before the step (so plain
    ``torch.optim`` runs can be logged beside ours: give it the groups of ``param_groups``).

    Args:
        optimizer: Any ``torch.optim`` optimizer; only groups with a ``sphere`` are logged.
        sink: A path (JSON lines) or a callable that takes each row, a dict.
        every: Log every this many steps.
        start: Steps that were made before (a resumed run goes on counting from there).

    Raises:
        ValueError: If ``every`` is not positive, or no group has a sphere.

    Notes:
        A row is ``{"step": int, "parameters": {name: {"sphere", "lr", "count", "norm": {"mean",
        "min", "q25", "median", "q75", "max"}, "angle": {...}, ...}}}``, plain numbers, with the
        probes and units of ``sphereopt.monitor.probes``; a joint sphere is logged once, under the
        names of its members joined by " + ". One host transfer per logged step.
        Hooks do not survive pickle or deepcopy of the optimizer, by torch's design: attach anew.

    Example:
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = sphereopt.SphereSGD(layer.parameters(), lr=0.1, sphere="row")
        >>> rows = []
        >>> with Tracker(optimizer, rows.append):
        ...     layer(torch.ones(1, 3)).square().sum().backward()
        ...     optimizer.step()
        >>> list(rows[0]["parameters"]["group 0, parameter 0"]["angle"])
        ['mean', 'min', 'q25', 'median', 'q75', 'max']
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sink: str | Path | Callable[[Row], object],
        *,
        every: int = 1,
        start: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be 1 or more")
        if all(group.get("sphere") is None for group in optimizer.param_groups):
            raise ValueError("no parameter group has a sphere; build them with param_groups")
        self.optimizer = optimizer
        self.every = every
        self.steps = start
        self._sink = sink if callable(sink) else JsonlSink(sink)
        self._before: list[_Before] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._pre_step),
            optimizer.register_step_post_hook(self._post_step),
        ]

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach from the optimizer and close a file that this tracker opened."""
        for hook in self._hooks:
            hook.remove()
        if isinstance(self._sink, JsonlSink):
            self._sink.close()

    def _pre_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        if isinstance(optimizer, SphereOptimizer):
            optimizer.readings = []
            return
        degree = 1 if isinstance(optimizer, torch.optim.SGD) else 0
        self._before = [
            _Before(
                parameter_name(group, index, start, len(params)),
                group,
                params,
                [p.detach().clone() for p in params],
                degree,
            )
            for index, group in enumerate(optimizer.param_groups)
            if group.get("sphere") is not None
            for start, params in units(group)
            if any(p.grad is not None for p in params)
        ]

    @torch.no_grad()
    def _post_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if self.steps % self.every:
            return
        if isinstance(optimizer, SphereOptimizer):
            readings, optimizer.readings = optimizer.readings or [], None
        else:
            readings = [before.compare() for before in self._before]
            self._before.clear()
        self._sink({"step": self.steps, "parameters": _reduce(readings)})


@dataclass(frozen=True, slots=True)
class _Before:
    """What another optimizer is about to change."""

    name: str
    group: dict[str, Any]
    params: list[Tensor]
    copies: list[Tensor]
    homogeneity: int

    def compare(self) -> Reading:
        """Return the reading of the step from the weights around it, in float64."""

        def seen(tensors: list[Tensor]) -> list[Tensor]:
            """Return the views of all members, piece by piece."""
            dtype = products.scalar_dtype(tensors[0].device)
            members = [spheres.split(x.detach(), self.group["sphere"]) for x in tensors]
            return [x.to(dtype) for piece in zip(*members, strict=True) for x in piece]

        w, after, lr = seen(self.copies), seen(self.params), float(self.group["lr"])
        u = [(x - y) / lr if lr else torch.zeros_like(x) for x, y in zip(w, after, strict=True)]
        members = [len(self.params)] * (len(w) // len(self.params))
        gram = products.gram(w, u, members=members)
        one, norm = torch.ones_like(gram.ww), _root(products.dot(after, after, members))
        trip = Travel(gram, one, -lr * one, one, norm)
        return Reading([self.name], [len(one)], trip, lr, self.group, self.homogeneity)


def _reduce(readings: list[Reading]) -> dict[str, Row]:
    """Return mean and quantiles of every probe over the spheres of each parameter."""
    values: dict[str, list[Tensor]] = {}
    about: dict[str, Row] = {}
    for reading in readings:
        table = torch.stack([probe(reading) for probe in PROBES.values()])
        for name, part in zip(
            reading.names, torch.split(table, reading.counts, dim=1), strict=True
        ):
            values.setdefault(name, []).append(part)
            about[name] = {"sphere": reading.group["sphere"], "lr": float(reading.lr)}
    tables = {name: torch.cat(parts, dim=1) for name, parts in values.items()}
    if not tables:
        return {}
    first = next(iter(tables.values())).device
    summary = torch.stack([_summarize(x).to(first) for x in tables.values()]).tolist()
    keys = ["mean", *QUANTILES]
    return {
        name: {
            **about[name],
            "count": table.shape[1],
            **{p: dict(zip(keys, row, strict=True)) for p, row in zip(PROBES, rows, strict=True)},
        }
        for (name, table), rows in zip(tables.items(), summary, strict=True)
    }


def _summarize(table: Tensor) -> Tensor:
    """Return mean and quantiles of each row, by sorting: ``torch.quantile`` stops at 2**24."""
    ordered = table.sort(dim=1).values
    at = torch.tensor(list(QUANTILES.values()), dtype=table.dtype, device=table.device)
    place = at * (table.shape[1] - 1)
    low, high = ordered[:, place.floor().long()], ordered[:, place.ceil().long()]
    return torch.cat([table.mean(dim=1, keepdim=True), torch.lerp(low, high, place.frac())], dim=1)


def track(
    optimizer: Optimizer,
    sink: str | Path | Callable[[Row], object],
    *,
    every: int = 1,
    start: int = 0,
) -> Tracker:
    """Start logging an optimizer; use as a context manager, or call ``close()``.

    Args:
        optimizer: Any ``torch.optim`` optimizer with groups from ``param_groups``.
        sink: A path (JSON lines, one object per logged step) or a callable that takes rows.
        every: Log every this many steps.
        start: Steps that were made before.

    Returns:
        The attached :class:`Tracker`.

    Raises:
        ValueError: If ``every`` is not positive, or no group has a sphere.

    Example:
        >>> import tempfile
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = sphereopt.SphereSGD(layer.parameters(), lr=0.1, sphere="row")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with track(optimizer, folder + "/run.jsonl", every=50):
        ...         pass  # train
    """
    return Tracker(optimizer, sink, every=every, start=start)
