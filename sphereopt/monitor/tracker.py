"""The tracker: what norms, angles and effective learning rates do, while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer

from sphereopt.monitor.around import Around, around, watched, whole
from sphereopt.monitor.header import header
from sphereopt.monitor.probes import PROBES, Probe
from sphereopt.monitor.schedule import Every, Names, Schedule, chosen
from sphereopt.monitor.sinks import Sink, open_sink
from sphereopt.monitor.summary import Summary
from sphereopt.monitor.window import Window
from sphereopt.names import did_you_mean
from sphereopt.optim._reading import Reading
from sphereopt.optim.base import SphereOptimizer

__all__ = ["Tracker", "track"]


class Tracker:
    """Log norm, angle, effective lr and more of every sphere, as training goes on.

    Attaches through torch's step hooks. On steps that are not logged it does nothing. On logged
    ones it takes the inner products that one of our optimizers computes; for any other optimizer it
    copies the weights of groups with a ``sphere`` before the step and compares them after it (so
    plain ``torch.optim`` runs are logged beside ours: give them the groups of ``param_groups``).
    Values are reduced to mean and quantiles over the spheres of a parameter on their device, and
    come to the host in one transfer.

    Args:
        optimizer: Any ``torch.optim`` optimizer; only groups with a ``sphere`` are logged.
        sink: Where rows go: a path (``.jsonl``, ``.csv`` or ``.parquet``), an object with
            ``add_scalar`` (TensorBoard) or ``log(dict, step=)`` (W&B, trackio, ...), a callable
            that takes each row, or a list of those. See :mod:`sphereopt.monitor.sinks`.
        every: Log every this many steps, or dense early and sparse later, ``{0: 1, 100: 50}``.
        start: Steps that were made before (a resumed run goes on counting from there).
        names: Parameters to log: a name, a glob (``"layer4.*"``), several, or a predicate.
        skip: Parameters to leave out, likewise.
        probes: What to measure: name to a function of a :class:`~sphereopt.optim.Reading`.
        window: Steps over which ``diffusive_angle`` is measured, at least; 0 turns it off.
        config: What to write into the header beside versions and options; anything JSON can hold.

    Raises:
        ValueError: If an argument is out of range, no group has a sphere, or nothing is left.
        TypeError: If ``config`` holds what JSON cannot, or ``sink`` is nothing that takes rows.
        OSError: If a file cannot be opened.

    Notes:
        A row is ``{"step": int, "metrics": {...}, "parameters": {name: {"sphere", "kind", "lr",
        "weight_decay", "count", "norm": {"mean", "min", "q25", "median", "q75", "max"}, "angle":
        {...}, ...}}}``, plain numbers, with the units of :mod:`sphereopt.monitor.probes`; a joint
        sphere is logged once, under the names of its members joined by " + ".

        Steps are those the optimizer made: accumulated batches make one, and a step that
        ``GradScaler`` skipped none. Of several processes the first writes; with sharded parameters
        (FSDP2) all take part, and what is logged is that of the whole tensors. Hooks do not survive
        pickle or deepcopy of the optimizer, by torch's design: attach anew.

    Example:
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = sphereopt.SphereSGD(layer.parameters(), lr=0.1, sphere="row")
        >>> rows = []
        >>> with Tracker(optimizer, rows.append) as tracker:
        ...     loss = layer(torch.ones(1, 3)).square().sum()
        ...     loss.backward()
        ...     tracker.log(loss=loss)
        ...     optimizer.step()
        >>> list(rows[0]["parameters"]["group 0, parameter 0"]["angle"])
        ['mean', 'min', 'q25', 'median', 'q75', 'max']
        >>> list(rows[0]["metrics"])
        ['loss']
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sink: Any,
        *,
        every: Every = 1,
        start: int = 0,
        names: Names = None,
        skip: Names = None,
        probes: Mapping[str, Probe] = PROBES,
        window: int = 100,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._schedule, self._keep = Schedule(every), chosen(names, skip)
        if window < 0:
            raise ValueError(f"window={window} must be 0 (off) or a number of steps")
        if all(group.get("sphere") is None for group in optimizer.param_groups):
            raise ValueError("no parameter group has a sphere; build them with param_groups")
        if not any(True for _ in watched(optimizer, self._keep)):
            known = [name for name, *_ in watched(optimizer, lambda name: True)]
            hint = did_you_mean(str(names), known) or f"; there are {', '.join(known[:5])}, ..."
            raise ValueError(f"names={names!r}, skip={skip!r} leave nothing to log{hint}")
        self.optimizer, self.steps = optimizer, start
        self._probes, self._window = probes, Window(window) if window else None
        self._metrics: dict[str, Any] = {}
        self._before: list[Around] = []
        self._summary: Summary | None = None
        self._skipped: Tensor | None = None
        self._sink: Sink | None = None
        if _is_first():
            about = header(optimizer, self._schedule, window, start, probes, config)
            self._sink = open_sink(sink)
            self._sink.start(about)
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
        """Detach from the optimizer and close the files that this tracker opened."""
        for hook in self._hooks:
            hook.remove()
        self._forget()
        if self._sink is not None:
            self._sink.close()

    def log(self, **metrics: float | Tensor) -> None:
        """Put numbers beside the next logged row, for instance the loss.

        Args:
            **metrics: Numbers, or tensors of one element; these stay on their device until the row
                is made. Of several values between two rows the last counts.

        Raises:
            ValueError: If a tensor has more than one element.
        """
        for name, value in metrics.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; log one number")
            self._metrics[name] = value.detach() if isinstance(value, Tensor) else float(value)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to count on: put it beside the optimizer's own."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Count on from a checkpoint.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        self.steps = int(state_dict["steps"])

    @_disable_dynamo
    def _pre_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._forget()
        if self.steps + 1 not in self._schedule:
            return
        if isinstance(optimizer, SphereOptimizer):
            if self._sink is not None:
                self._summary = Summary(self._probes, self._keep)
                optimizer.listeners = (*optimizer.listeners, self._take)
        elif self._sink is not None or _is_sharded(optimizer):
            self._before = around(optimizer, self._keep)

    @_disable_dynamo
    @torch.no_grad()
    def _post_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.steps += 1
        found = getattr(optimizer, "found_inf", None)  # of a GradScaler that leaves skipping to us
        if isinstance(found, Tensor):
            self._skipped = found if self._skipped is None else self._skipped + found
        if self.steps not in self._schedule:
            return
        if self._skipped is not None:
            made = not (isinstance(found, Tensor) and bool(found.any()))
            self.steps -= round(float(self._skipped))
            self._skipped = None
            if not made:
                self._forget()
                return
        summary = self._summary or Summary(self._probes, self._keep)
        for before in self._before:
            for reading in before.readings():
                summary.take(reading)
        self._look_back(optimizer, summary)
        self._forget()
        if self._sink is not None:
            self._write(summary)

    def _take(self, reading: Reading) -> None:
        if self._summary is not None:
            self._summary.take(reading)

    def _look_back(self, optimizer: Optimizer, summary: Summary) -> None:
        """Add the diffusive angles of the parameters whose samples are old enough."""
        if self._window is None or not (self._sink is not None or self._before):
            return
        for name, group, params in watched(optimizer, self._keep):
            if any(p.grad is None or not p.numel() for p in params):
                continue
            if self._window.due(name, self.steps):
                tensors = [whole(p.detach()) for p in params]
                turned = self._window.turned(name, tensors, group["sphere"], self.steps)
                if turned is not None:
                    summary.add(name, group, "diffusive_angle", turned)

    def _write(self, summary: Summary) -> None:
        parameters, metrics = summary.parameters(self._metrics)
        self._metrics = {}
        row: dict[str, Any] = {"step": self.steps}
        if metrics:
            row["metrics"] = metrics
        assert self._sink is not None
        self._sink({**row, "parameters": parameters})

    def _forget(self) -> None:
        """Stop listening, and let go of what the last step left."""
        self._before.clear()
        self._summary = None
        if isinstance(self.optimizer, SphereOptimizer):
            mine = self._take
            self.optimizer.listeners = tuple(x for x in self.optimizer.listeners if x != mine)


def _is_first() -> bool:
    """Return whether this process writes: the only one, or the first of several."""
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not spread or torch.distributed.get_rank() == 0


def _is_sharded(optimizer: Optimizer) -> bool:
    params = (p for group in optimizer.param_groups for p in group["params"])
    return any(hasattr(p, "full_tensor") for p in params)


def track(
    optimizer: Optimizer,
    sink: Any,
    *,
    every: Every = 1,
    start: int = 0,
    names: Names = None,
    skip: Names = None,
    probes: Mapping[str, Probe] = PROBES,
    window: int = 100,
    config: Mapping[str, Any] | None = None,
) -> Tracker:
    """Start logging an optimizer; use as a context manager, or call ``close()``.

    Args:
        optimizer: Any ``torch.optim`` optimizer with groups from ``param_groups``.
        sink: Where rows go, see :class:`Tracker`: ``"run.jsonl"``, a ``SummaryWriter``, ...
        every: Log every this many steps, or dense early and sparse later, ``{0: 1, 100: 50}``.
        start: Steps that were made before.
        names: Parameters to log: a name, a glob, several, or a predicate.
        skip: Parameters to leave out, likewise.
        probes: What to measure, see :data:`sphereopt.monitor.PROBES`.
        window: Steps over which ``diffusive_angle`` is measured, at least; 0 turns it off.
        config: What to write into the header beside versions and options.

    Returns:
        The attached :class:`Tracker`.

    Raises:
        ValueError: If an argument is out of range, or no group has a sphere.
        OSError: If a file cannot be opened.

    Example:
        >>> import tempfile
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = sphereopt.SphereSGD(layer.parameters(), lr=0.1, sphere="row")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with track(optimizer, folder + "/run.jsonl", every={0: 1, 100: 50}):
        ...         pass  # train
    """
    return Tracker(
        optimizer,
        sink,
        every=every,
        start=start,
        names=names,
        skip=skip,
        probes=probes,
        window=window,
        config=config,
    )
