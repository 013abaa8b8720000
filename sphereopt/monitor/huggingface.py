"""Log norms and angles from the ``Trainer`` of transformers.

transformers is optional: only this module imports it. ``pip install "sphereopt[hf]"``.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch.optim.optimizer import Optimizer

from sphereopt.monitor.tracker import Tracker

__all__ = ["NormMonitor"]


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":  # it is there, and broken
            raise
    raise ImportError('transformers is not installed; run: pip install "sphereopt[hf]"')


class NormMonitor(_transformers().TrainerCallback):  # type: ignore[misc]  # Any: may be missing
    """Track the optimizer of a ``transformers.Trainer``, and go on after a resume.

    Args:
        sink: As of :func:`sphereopt.track`: a path, a callable, ..., or a list of those.
        **options: The other options of :func:`sphereopt.track` but ``start``: ``every``, ...

    Raises:
        TypeError: If ``track`` has no such option.
        ValueError: At the start of ``train``, if the optimizer has no group with a sphere.

    Notes:
        The steps are the trainer's ``global_step``: those of the optimizer, so gradient
        accumulation makes one row of several batches. Resumed from a checkpoint, file and numbers
        go on. What the trainer logs (loss, grad_norm, ...) comes after the step, so it goes with
        the next row, under ``"metrics"``. ``report_to`` is left as it is.

        The trainer does not tell its callbacks of exceptions. Nothing is lost then, because rows
        are on disk once written, but the monitor stays attached: ``close()`` it, or use it as a
        context manager around ``train()``. A new ``train()`` closes it as well. Only the process of
        world rank 0 writes.

    Example:
        >>> monitor = NormMonitor("run.jsonl", every={0: 1, 100: 50})
        >>> trainer = transformers.Trainer(model, args, callbacks=[monitor],
        ...     **sphereopt.hf.trainer_kwargs(model, batch, lr=3e-3))  # doctest: +SKIP
    """

    def __init__(self, sink: Any, **options: Any) -> None:
        inspect.signature(Tracker).bind(None, sink, start=0, **options)
        self._sink = sink
        self._options = options
        self._tracker: Tracker | None = None

    def __enter__(self) -> NormMonitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the optimizer."""
        self.close()
        # All processes take part: of sharded parameters each has a part.
        sink = self._sink if state.is_world_process_zero else lambda row: None
        optimizer, start = _unwrapped(kwargs["optimizer"]), state.global_step
        self._tracker = Tracker(optimizer, sink, start=start, **self._options)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count as the trainer does, which also counts steps that a loss scaler has skipped."""
        if self._tracker is not None and self._tracker.steps != state.global_step:
            self._tracker.load_state_dict({"steps": state.global_step})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand on what the trainer has logged."""
        logs = kwargs.get("logs") or {}
        if self._tracker is not None:
            self._tracker.log(**{k: v for k, v in logs.items() if isinstance(v, int | float)})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach and close."""
        self.close()

    def close(self) -> None:
        """Detach from the optimizer and close the files."""
        if self._tracker is not None:
            self._tracker.close()
        self._tracker = None


def _unwrapped(optimizer: Any) -> Optimizer:
    """Return torch's optimizer inside accelerate's, which is one by its class."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    inner: Optimizer = optimizer
    return inner
