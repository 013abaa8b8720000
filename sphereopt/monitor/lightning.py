"""Log norms and angles from a Lightning ``Trainer``.

Lightning is optional: only this module imports it. ``pip install "sphereopt[lightning]"``.
"""

from __future__ import annotations

import importlib
import inspect
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from sphereopt.monitor.around import watched
from sphereopt.monitor.schedule import Schedule, chosen
from sphereopt.monitor.tracker import Tracker

__all__ = ["NormMonitor"]


def _lightning() -> Any:
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name not in ("lightning", package):  # it is there, and broken
                raise
    raise ImportError('Lightning is not installed; run: pip install "sphereopt[lightning]"')


class NormMonitor(_lightning().Callback):  # type: ignore[misc]  # Any, so that it may be missing
    """Track every optimizer of a Lightning run that has spheres, and go on after a resume.

    Args:
        sink: As of :func:`sphereopt.track`: a path, a callable, ..., or a list of those. None: the
            trainer's loggers.
        loggers: Also log to the trainer's loggers. By default only if there is no ``sink``.
        **options: The other options of :func:`sphereopt.track` but ``start``: ``every``, ...

    Raises:
        TypeError: If ``track`` has no such option.
        ValueError: At the start of ``fit``, if no optimizer has a group with a sphere, or there is
            neither a sink nor a logger.

    Notes:
        A step is a step of the optimizer, so gradient accumulation makes one row of several
        batches. What ``self.log`` was given in ``training_step`` goes with the row of the same
        step, under ``"metrics"``; what is known at the end of an epoch or of a validation goes with
        the next row.

        Several optimizers count their own steps, while the trainer's ``global_step`` counts all of
        them together. If more than one has spheres, each writes a file of its own:
        ``run.0.jsonl``, ``run.1.jsonl`` for ``"run.jsonl"``.

        The numbers of steps are part of the checkpoint. From a checkpoint without them (the monitor
        is new) they come from ``global_step``, or, with several optimizers, from the ``step`` in
        their states.

        Attaches after the sanity check, and to nothing in ``validate``, ``test`` and ``predict``;
        ends at the end of ``fit``, at an exception and at an interrupt. Only the process of global
        rank 0 writes. With ``fast_dev_run`` everything runs and nothing is written.

    Example:
        >>> import lightning.pytorch as pl
        >>> monitor = NormMonitor("run.jsonl", every={0: 1, 100: 50})
        >>> trainer = pl.Trainer(callbacks=[monitor], max_epochs=1, accelerator="cpu", logger=False)
        >>> trainer.fit(module, batches)  # doctest: +SKIP
    """

    def __init__(self, sink: Any = None, *, loggers: bool | None = None, **options: Any) -> None:
        inspect.signature(Tracker).bind(None, sink, start=0, **options)
        self._schedule = Schedule(options.get("every", 1))
        self._keep = chosen(options.get("names"), options.get("skip"))
        self._sink = sink
        self._loggers = sink is None if loggers is None else loggers
        self._options = options
        self._trackers: dict[int, Tracker] = {}
        self._steps: dict[int, int] = {}
        self._seen: dict[int, dict[str, Tensor]] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the steps of another run."""
        if stage == "fit" and trainer.global_step == 0:
            self._steps = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers."""
        self._close()
        found = {
            index: optimizer
            for index, optimizer in enumerate(trainer.optimizers)
            if any(True for _ in watched(optimizer, self._keep))
        }
        if not found:
            raise ValueError(
                "no optimizer of this run has a parameter group with a sphere, or names= and skip= "
                "leave none; build the groups in configure_optimizers with sphereopt.param_groups"
            )
        for index, optimizer in found.items():
            sink = self._sinks(trainer, f".{index}" if len(found) > 1 else "")
            start = self._steps.get(index, _steps_made(trainer, optimizer))
            self._trackers[index] = Tracker(optimizer, sink, start=start, **self._options)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Hand on what the training step has logged."""
        for index, tracker in self._trackers.items():
            # Reading the metrics may wait for the device: only for steps that are logged.
            if tracker.optimizer is optimizer and tracker.steps + 1 in self._schedule:
                metrics = dict(trainer.callback_metrics)
                # Those of past epochs stay there as they are: each goes with one row.
                seen = self._seen.get(index, {})
                new = {k: v for k, v in metrics.items() if v is not seen.get(k)}
                tracker.log(**{k: v for k, v in new.items() if v.numel() == 1})
                self._seen[index] = metrics

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach and close."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach and close."""
        self._close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach and close."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps of each optimizer."""
        return {"steps": self._steps | {i: tracker.steps for i, tracker in self._trackers.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self._steps = dict(state_dict["steps"])

    def _sinks(self, trainer: Any, mark: str) -> Any:
        # All processes take part: of sharded parameters each has a part.
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return lambda row: None
        given = self._sink if isinstance(self._sink, list | tuple) else [self._sink]
        sinks = [_marked(sink, mark) for sink in given if sink is not None]
        sinks += trainer.loggers if self._loggers else []
        if not sinks:
            raise ValueError(
                "NormMonitor has nowhere to write: the trainer has no logger; give it a sink, "
                'NormMonitor("run.jsonl")'
            )
        return sinks

    def _close(self) -> None:
        self._steps = self.state_dict()["steps"]
        trackers, self._trackers, self._seen = self._trackers, {}, {}
        for tracker in trackers.values():
            tracker.close()


def _marked(sink: Any, mark: str) -> Any:
    """Return a path with a mark before its suffix; anything else as it is."""
    if not isinstance(sink, str | os.PathLike):
        return sink
    path = Path(sink)
    return path.with_name(f"{path.stem}{mark}{path.suffix}")


def _steps_made(trainer: Any, optimizer: Optimizer) -> int:
    """Return the steps of an optimizer in a run that was not monitored so far."""
    total, count = int(trainer.global_step), len(trainer.optimizers)
    if count == 1:
        return total
    made = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(made, default=total // count)
