"""A log as arrays: what every figure and sentence of a report is made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sphereopt.monitor.rows import LogError, Row, Rows, check_row
from sphereopt.monitor.summary import STATS

__all__ = ["History", "as_history"]

Array = NDArray[np.float64]

#: Numbers that a history holds at most; longer logs are thinned.
BUDGET = 20_000_000

_SETTINGS = ("lr", "weight_decay")
_ABOUT = ("sphere", "kind", "count")
# What a row costs beside its numbers, in numbers: many small rows must not fill the memory.
_OVERHEAD = 128


@dataclass(frozen=True, eq=False)
class History:
    r"""A log as arrays, thinned so that memory stays bounded.

    T is the number of rows that are held and L that of parameters.

    Attributes:
        source: The file, or ``"rows"``.
        runs: The headers, one for the start and one for every resume.
        steps: Optimizer steps made, shape (T,), increasing.
        names: Parameters, in order of appearance.
        about: Parameter to its ``"sphere"``, ``"kind"`` and ``"count"`` (of spheres).
        settings: ``"lr"`` and ``"weight_decay"``, shape (T, L) each.
        values: Probe to shape (T, L, 6), NaN where absent; the last axis is mean, min, q25,
            median, q75, max. Units are those of :mod:`sphereopt.monitor.probes`.
        metrics: What the user logged, name to shape (T,), NaN where absent.
        logged: How many rows the log has, superseded ones not counted.
        notes: Sentences on what is not shown as it was logged.

    Notes:
        Of a log that is too long every k-th row is held, and the last. What such a row lacks, a
        probe that is measured now and then for instance, is taken from the next row that has it,
        if that comes before the next row held.

    Example:
        >>> tables = [{"norm": {"median": 2.0}}, {"norm": {"median": 3.0}}]
        >>> rows = [{"step": i, "parameters": {"w": table}} for i, table in enumerate(tables)]
        >>> History.from_rows(rows).of("norm")
        array([[2.],
               [3.]])
    """

    source: str
    runs: tuple[Row, ...]
    steps: NDArray[np.int64]
    names: tuple[str, ...]
    about: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Array]
    values: Mapping[str, Array]
    metrics: Mapping[str, Array]
    logged: int
    notes: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path) -> History:
        """Read a log of JSON lines, row by row.

        Args:
            path: The file.

        Returns:
            Its history.

        Raises:
            LogError: If the file cannot be read, is no log, or holds no rows; the message names
                the line.
        """
        return _read(Rows(path))

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], runs: Iterable[Mapping[str, Any]] = ()
    ) -> History:
        """Make a history of rows in memory.

        Args:
            rows: Rows as a sink gets them, in the order they were logged.
            runs: The headers that belong to them.

        Returns:
            Their history.

        Raises:
            LogError: If one is not a row, or there is none.
        """
        rows = rows if isinstance(rows, Sequence) else list(rows)
        return _read(Rows(rows), [dict(run) for run in runs])

    def of(self, probe: str, stat: str = "median") -> Array:
        """Return one statistic of a probe.

        Args:
            probe: Name of the probe.
            stat: ``"mean"``, ``"min"``, ``"q25"``, ``"median"``, ``"q75"`` or ``"max"``, over the
                spheres of a parameter.

        Returns:
            Shape (T, L), a view.

        Raises:
            KeyError: If the log has no such probe, or there is no such statistic.
        """
        if probe not in self.values:
            raise KeyError(f"probe={probe!r} was not logged; there are {', '.join(self.values)}")
        if stat not in STATS:
            raise KeyError(f"stat={stat!r} must be one of {', '.join(STATS)}")
        return self.values[probe][:, :, STATS.index(stat)]


def as_history(log: str | Path | Iterable[Mapping[str, Any]] | History) -> History:
    """Return the history of a log, however it is given.

    Args:
        log: A path, rows, or a history, which is returned as it is.

    Returns:
        The history.

    Raises:
        LogError: If the log cannot be read.

    Example:
        >>> as_history([{"step": 7, "parameters": {}}]).steps
        array([7])
    """
    if isinstance(log, History):
        return log
    return History.read(log) if isinstance(log, str | Path) else History.from_rows(log)


@dataclass(slots=True)
class _Held:
    """A row that is held, in the layout that was known when it came."""

    step: int
    table: Array  # parameters, probes, statistics
    settings: Array  # parameters, settings
    metrics: Array

    def fit(self, parameters: int, probes: int, metrics: int) -> None:
        """Make room for what has appeared since."""
        if self.table.shape[:2] != (parameters, probes):
            self.table = _padded(self.table, (parameters, probes, len(STATS)))
            self.settings = _padded(self.settings, (parameters, len(_SETTINGS)))
        if len(self.metrics) != metrics:
            self.metrics = _padded(self.metrics, (metrics,))

    def fill(self, other: _Held) -> None:
        """Take from a later row what this one lacks."""
        self.fit(other.table.shape[0], other.table.shape[1], len(other.metrics))
        lacking = np.isnan(self.table).all(axis=2)
        self.table[lacking] = other.table[lacking]
        for mine, theirs in ((self.settings, other.settings), (self.metrics, other.metrics)):
            np.copyto(mine, theirs, where=np.isnan(mine))


class _Thinner:
    """Rows of any number, held within the budget: every ``stride``-th, and the last."""

    def __init__(self) -> None:
        self.parameters: dict[str, int] = {}
        self.probes: dict[str, int] = {}
        self.metrics: dict[str, int] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.held: list[_Held] = []
        self.stride, self.count = 1, 0
        self._last: _Held | None = None

    def add(self, row: Row, where: str) -> None:
        """Take the next row."""
        self._last = self._arrays(row, where)
        if self.count % self.stride == 0:
            self.held.append(self._last)
        else:
            self.held[-1].fill(self._last)
        self.count += 1
        while len(self.held) * self._width() > BUDGET:
            self._thin(where)

    def finish(self) -> list[_Held]:
        """Return what is held, with the last row."""
        if self._last is not None and self._last is not self.held[-1]:
            self.held.append(self._last)
        return self.held

    def _width(self) -> int:
        row = len(self.parameters) * (len(self.probes) * len(STATS) + len(_SETTINGS))
        return row + len(self.metrics) + _OVERHEAD

    def _thin(self, where: str) -> None:
        if len(self.held) < 2:
            size = f"{len(self.parameters)} parameters, {len(self.probes)} probes"
            raise LogError(f"{where}: too large for a history ({size}); log fewer with names=")
        for first, second in zip(self.held[::2], self.held[1::2], strict=False):
            first.fill(second)
        del self.held[1::2]
        self.stride *= 2

    def _arrays(self, row: Row, where: str) -> _Held:
        """Return a row as arrays, and note the names that are new."""
        places: list[tuple[int, int]] = []
        numbers: list[Any] = []
        settings: list[list[Any]] = []
        for name, entry in row["parameters"].items():
            at = self.parameters.setdefault(name, len(self.parameters))
            self.about[name] = {key: entry.get(key) for key in _ABOUT}
            settings.append([entry.get(key) for key in _SETTINGS])
            for key, table in entry.items():
                if type(table) is dict:
                    places.append((at, self.probes.setdefault(key, len(self.probes))))
                    numbers += map(table.get, STATS)
        logged = row.get("metrics") or {}
        for name in logged:
            self.metrics.setdefault(name, len(self.metrics))
        sizes = len(self.parameters), len(self.probes), len(self.metrics)
        held = _Held(row["step"], _nans(*sizes[:2], 6), _nans(sizes[0], 2), _nans(sizes[2]))
        try:
            if places:
                held.table[tuple(zip(*places, strict=True))] = _numbers(numbers).reshape(-1, 6)
            if settings:
                held.settings[[self.parameters[n] for n in row["parameters"]]] = _numbers(settings)
            held.metrics[[self.metrics[name] for name in logged]] = _numbers([*logged.values()])
        except OverflowError as error:
            raise LogError(f"{where}: a number is out of range ({error})") from None
        return held


def _read(rows: Rows, runs: Sequence[Row] = ()) -> History:
    thinner = _Thinner()
    for number, row in rows:
        where = rows.where(number)
        check_row(row, where)
        thinner.add(row, where)
    held = thinner.finish()
    if not held:
        what = "holds headers but no rows" if rows.runs else "is empty"
        raise LogError(f"{rows.source}: {what}: no step was logged yet")
    sizes = len(thinner.parameters), len(thinner.probes), len(thinner.metrics)
    steps = np.array([each.step for each in held])
    table = np.empty((len(held), *sizes[:2], len(STATS)))
    settings = np.empty((len(held), sizes[0], len(_SETTINGS)))
    metrics = np.empty((len(held), sizes[2]))
    # Rows are given up as they are copied: both at once would take twice the memory.
    for i in range(len(held) - 1, -1, -1):
        each = held.pop()
        each.fit(*sizes)
        table[i], settings[i], metrics[i] = each.table, each.settings, each.metrics
    return History(
        source=rows.source,
        runs=(*runs, *rows.runs),
        steps=steps,
        names=tuple(thinner.parameters),
        about=thinner.about,
        settings={key: settings[:, :, i] for i, key in enumerate(_SETTINGS)},
        values={probe: table[:, :, i] for probe, i in thinner.probes.items()},
        metrics={name: metrics[:, i] for name, i in thinner.metrics.items()},
        logged=thinner.count,
        notes=tuple(_notes(rows, thinner.stride)),
    )


def _notes(rows: Rows, stride: int) -> Iterable[str]:
    if rows.half:
        yield "a half-written last line is left out"
    if rows.superseded:
        count = f"{rows.superseded:,} row{'s' if rows.superseded > 1 else ''}"
        yield f"{count} superseded: a resumed run made these steps again"
    if stride > 1:
        yield f"thinned: one row in {stride} is shown, and the last"


def _numbers(values: Sequence[Any]) -> Array:
    """Return numbers as an array, None as NaN."""
    return np.array(list(values), dtype=np.float64)


def _nans(*shape: int) -> Array:
    return np.full(shape, np.nan)


def _padded(array: Array, shape: Sequence[int]) -> Array:
    """Return an array with NaN appended along its axes."""
    return np.pad(
        array,
        list(chain((0, size - old) for size, old in zip(shape, array.shape, strict=True))),
        constant_values=np.nan,
    )
