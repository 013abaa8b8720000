"""Where rows go: files, dashboards, callables, or several of those."""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sphereopt.monitor.jsonl import JsonlSink
from sphereopt.monitor.rows import Row
from sphereopt.monitor.summary import STATS
from sphereopt.monitor.table import CsvSink, ParquetSink

__all__ = ["LogSink", "ScalarSink", "Sink", "open_sink", "scalars"]

_FILES: dict[str, Callable[[Path], Callable[[Row], object]]] = {
    ".jsonl": JsonlSink,
    ".csv": CsvSink,
    ".parquet": ParquetSink,
}


def scalars(
    row: Row, stats: Sequence[str] = ("median",), probes: Sequence[str] | None = None
) -> dict[str, float]:
    """Return a row as flat names and numbers, as dashboards take them.

    Args:
        row: A row of a log.
        stats: Which statistics of each probe: some of ``"mean"``, ``"min"``, ``"q25"``,
            ``"median"``, ``"q75"``, ``"max"``.
        probes: Which probes; by default all.

    Returns:
        ``"sphereopt/<probe>/<parameter>"`` for medians, ``"sphereopt/<probe>/<parameter>/<stat>"``
        for other statistics, and ``"sphereopt/metrics/<name>"``; what is not finite is left out.

    Notes:
        Characters of names that some dashboard refuses, such as the " + " of a joint sphere and
        the comma of a parameter without a name, become "_".

    Example:
        >>> row = {"step": 1, "parameters": {"w": {"lr": 0.1, "norm": {"median": 2.0}}}}
        >>> scalars(row)
        {'sphereopt/norm/w': 2.0}
    """
    found = {f"sphereopt/metrics/{name}": x for name, x in row.get("metrics", {}).items()}
    for name, entry in row["parameters"].items():
        for probe, table in entry.items():
            if isinstance(table, dict) and (probes is None or probe in probes):
                for stat in stats:
                    end = "" if stat == "median" else f"/{stat}"
                    found[f"sphereopt/{probe}/{name}{end}"] = table.get(stat)
    return {
        re.sub(r"[^-/\w.]+", "_", tag): float(x)
        for tag, x in found.items()
        if x is not None and math.isfinite(x)
    }


class ScalarSink:
    """Hand rows to an object with ``add_scalar(tag, value, step)``, such as a SummaryWriter.

    Args:
        writer: TensorBoard's or tensorboardX's ``SummaryWriter``, or an object like it.
        stats: Which statistics; only the median by default, since dashboards are flooded easily.
        probes: Which probes; by default all.

    Raises:
        ValueError: If a statistic is not known.

    Example:
        >>> class Writer:
        ...     def add_scalar(self, tag, value, global_step):
        ...         print(tag, value, global_step)
        >>> sink = ScalarSink(Writer(), probes=["norm"])
        >>> sink({"step": 5, "parameters": {"w": {"norm": {"median": 2.0}}}})
        sphereopt/norm/w 2.0 5
    """

    def __init__(
        self,
        writer: Any,
        stats: Sequence[str] = ("median",),
        probes: Sequence[str] | None = None,
    ) -> None:
        self.writer = writer
        self._stats, self._probes = _known(stats), probes

    def __call__(self, row: Row) -> None:
        """Add the scalars of one row."""
        for tag, value in scalars(row, self._stats, self._probes).items():
            self.writer.add_scalar(tag, value, row["step"])


class LogSink:
    """Hand each row, in one call, to an object with ``log_metrics`` or ``log(dict, step=)``.

    Args:
        run: A run of W&B or trackio, a Lightning logger, a Comet experiment, the mlflow module, or
            an object like them.
        stats: Which statistics; only the median by default, since dashboards are flooded easily.
        probes: Which probes; by default all.

    Raises:
        TypeError: If the object's method does not take a dict and a step.
        ValueError: If a statistic is not known.

    Example:
        >>> class Run:
        ...     def log(self, data, step=None):
        ...         print(data, step)
        >>> sink = LogSink(Run(), stats=["median", "max"])
        >>> sink({"step": 5, "parameters": {"w": {"norm": {"median": 2.0, "max": 3.0}}}})
        {'sphereopt/norm/w': 2.0, 'sphereopt/norm/w/max': 3.0} 5
    """

    def __init__(
        self,
        run: Any,
        stats: Sequence[str] = ("median",),
        probes: Sequence[str] | None = None,
    ) -> None:
        self.run = run
        # The more special name first: a "log" may be anything, a logging.Logger's for instance.
        self._log: Callable[..., object] = getattr(run, "log_metrics", None) or run.log
        self._stats, self._probes = _known(stats), probes
        with suppress(ValueError):  # what is written in C may not tell its signature
            signature = inspect.signature(self._log)
            try:
                signature.bind({}, step=0)
            except TypeError as error:
                name = f"{type(run).__name__}.{getattr(self._log, '__name__', 'log')}"
                raise TypeError(f"{name} must take a dict and step=, but: {error}") from None

    def __call__(self, row: Row) -> None:
        """Log the scalars of one row."""
        if found := scalars(row, self._stats, self._probes):
            self._log(found, step=row["step"])


class Sink:
    """Several sinks as one, none of which can stop training.

    The first error of each is a RuntimeWarning, further ones are silent; rows go on being offered,
    since a full disk may be cleared. Errors of ``start`` are raised.

    Args:
        sinks: Callables that take a row and may have ``start(run)``.
        owned: Those of them to be closed with this one.

    Example:
        >>> rows = []
        >>> sink = Sink([rows.append])
        >>> sink({"step": 1, "parameters": {}})
        >>> rows
        [{'step': 1, 'parameters': {}}]
    """

    def __init__(self, sinks: Sequence[Callable[[Row], object]], owned: Sequence[Any] = ()) -> None:
        self._sinks, self._owned = list(sinks), list(owned)
        self._failed: set[int] = set()

    def start(self, run: dict[str, Any]) -> None:
        """Hand over the header of a run."""
        try:
            for sink in self._sinks:
                start = getattr(sink, "start", None)
                if callable(start):
                    start(run)
        except BaseException:
            _release(self._owned)
            raise

    def __call__(self, row: Row) -> None:
        """Hand over a row."""
        for sink in self._sinks:
            self._try(sink, sink, f"at step {row['step']}, training goes on", row)

    def close(self) -> None:
        """Close the files that were opened from paths."""
        for sink in self._owned:
            self._try(sink, sink.close, "while closing")

    def _try(self, sink: object, call: Callable[..., object], when: str, *args: Row) -> None:
        try:
            call(*args)
        except Exception as error:
            if args and id(sink) in self._failed:
                return
            self._failed.add(id(sink))
            what = f"sink {_name(sink)} failed {when}: {type(error).__name__}: {error}"
            warnings.warn(what, RuntimeWarning, stacklevel=3)


def open_sink(target: Any) -> Sink:
    """Open what a user named as the place for rows.

    Args:
        target: A path ending in ``.jsonl``, ``.csv`` or ``.parquet``; an object with
            ``add_scalar(tag, value, step)``; one with ``log_metrics(dict, step=)`` or
            ``log(dict, step=)``; a callable that takes a row; or a list of those.

    Returns:
        One sink for all of them. It closes what it opened from a path, and nothing else.

    Raises:
        ValueError: If a path has another suffix or holds something else, or two targets write to
            the same file.
        TypeError: If an object is none of those.
        OSError: If a file cannot be opened.

    Example:
        >>> rows = []
        >>> sink = open_sink([rows.append, print])
        >>> sink({"step": 1, "parameters": {}})
        {'step': 1, 'parameters': {}}
    """
    targets = list(target) if isinstance(target, list | tuple) else [target]
    _refuse_clashes([Path(t) for t in targets if isinstance(t, str | os.PathLike)])
    sinks: list[Callable[[Row], object]] = []
    owned: list[Any] = []
    try:
        for each in targets:
            sinks.append(_opened(each))
            if isinstance(each, str | os.PathLike):
                owned.append(sinks[-1])
    except BaseException:
        _release(owned)
        raise
    return Sink(sinks, owned)


def _opened(target: Any) -> Callable[[Row], object]:
    if isinstance(target, str | os.PathLike):
        path = Path(target)
        if path.suffix not in _FILES:
            raise ValueError(f"sink={str(path)!r}: a path must end in {', '.join(_FILES)}")
        return _FILES[path.suffix](path)
    if callable(getattr(target, "add_scalar", None)):
        return ScalarSink(target)
    if any(callable(getattr(target, name, None)) for name in ("log_metrics", "log")):
        return LogSink(target)
    if not callable(target):
        kinds = "a path, a callable, or an object with add_scalar, log_metrics or log"
        raise TypeError(f"sink={target!r} must be {kinds}")
    found: Callable[[Row], object] = target
    return found


def _release(sinks: Sequence[Any]) -> None:
    """Close files without finishing them: no table is made of a run that did not begin."""
    for sink in sinks:
        getattr(sink, "journal", sink).close()


def _refuse_clashes(paths: Sequence[Path]) -> None:
    """Raise if two paths lead to one file; a Parquet file's journal counts."""
    seen: dict[Path, Path] = {}
    for path in paths:
        journal = path.with_suffix(".jsonl") if path.suffix == ".parquet" else path
        other = seen.setdefault(journal.resolve(), path)
        if other is not path:
            raise ValueError(f"sinks {other} and {path} both write to {journal}; name one of them")


def _known(stats: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stats, str) or not set(stats) <= set(STATS):
        raise ValueError(f"stats={stats!r} must be a list of some of {', '.join(STATS)}")
    return tuple(stats)


def _name(sink: object) -> str:
    for key in ("path", "writer", "run"):
        found = getattr(sink, key, None)
        if found is not None:
            return str(found) if key == "path" else type(found).__name__
    return getattr(sink, "__qualname__", type(sink).__name__)
