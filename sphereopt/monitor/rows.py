"""Reading a log: a stream of rows, each step once, and errors that name the line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = [
    "LONGEST_LINE",
    "LogError",
    "Row",
    "Rows",
    "check_row",
    "iterate",
    "loaded",
    "read_jsonl",
]

Row = dict[str, Any]

#: A longer line is no log's: it is refused rather than read into memory.
LONGEST_LINE = 64 * 2**20

_STEP = re.compile(rb'\{"step": ?(-?\d{1,18})[,}]')
_NUMBERS = {float, int, type(None)}
_OTHERS = {
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
    b"PK": "is a zip archive (perhaps a checkpoint), not a log",
    b"PAR1": "is a Parquet file; the log is the .jsonl beside it",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
}


class LogError(ValueError):
    """A log that cannot be read; the message names the file, the line, and what is wrong.

    Example:
        >>> try:
        ...     read_jsonl("no such folder/run.jsonl")
        ... except LogError as error:
        ...     print(error)
        no such folder/run.jsonl: No such file or directory
    """


class Rows:
    """The rows of a log in the order of their steps, each step once: a stream, read at least twice.

    A resumed run makes steps again, and a row whose step is not beyond that of the row before says
    that everything logged from this step on is superseded. Rows of one step with different
    parameters come from several optimizers and are merged.

    Args:
        log: A file of JSON lines, or rows; rows may have headers ``{"run": {...}}`` among them.

    Attributes:
        source: What messages call the log.
        runs: The headers that were met.
        superseded: How many rows were left out.
        half: Whether a half-written last line was left out.

    Raises:
        LogError: On iteration, if a line cannot be read.

    Example:
        >>> rows = Rows([{"step": 10}, {"step": 20}, {"step": 15}, {"step": 20, "again": True}])
        >>> [row for _, row in rows], rows.superseded
        ([{'step': 10}, {'step': 15}, {'step': 20, 'again': True}], 1)
    """

    def __init__(self, log: str | Path | Sequence[Mapping[str, Any]]) -> None:
        self.log = log
        self.source = str(log) if isinstance(log, str | Path) else "rows"
        self.runs: list[Row] = []
        self.superseded = 0
        self.half = False

    def where(self, number: int) -> str:
        """Return what messages call a line."""
        return f"{self.source}, {'row' if self.source == 'rows' else 'line'} {number}"

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Yield line number and row."""
        self.runs, self.superseded, self.half = [], 0, False
        held: tuple[int, Row] | None = None
        for number, row in self._surviving():
            if held is not None and _of_one_step(held[1], row):
                held = held[0], _merged(held[1], row)
                continue
            if held is not None:
                yield held
            held = number, row
        if held is not None:
            yield held

    def _surviving(self) -> Iterator[tuple[int, Row]]:
        # The last line of the first pass is the last of the second: a run may go on writing.
        rewinds, last = _rewinds(self._raw())
        for number, row in self._parsed():
            if number > last:
                return
            if row is None:
                self.half = True
            elif isinstance(row.get("run"), dict) and "step" not in row:
                self.runs.append(row["run"])
            else:
                while rewinds and rewinds[-1][0] <= number:
                    rewinds.pop()
                step = _step(row)
                if step is not None and rewinds and step >= rewinds[-1][1]:
                    self.superseded += 1
                else:
                    yield number, row

    def _parsed(self) -> Iterator[tuple[int, Row | None]]:
        if isinstance(self.log, str | Path):
            yield from _objects(self.log)
            return
        for number, row in enumerate(self.log, 1):
            if not isinstance(row, Mapping):
                raise LogError(f"{self.where(number)} is a {type(row).__name__}, not a dict")
            yield number, dict(row)

    def _raw(self) -> Iterator[tuple[int, bytes | Mapping[str, Any]]]:
        if isinstance(self.log, str | Path):
            return _lines(self.log)
        return enumerate(self.log, 1)


def iterate(path: str | Path) -> Iterator[tuple[int, Row]]:
    r"""Yield line number and object of every line, headers and superseded rows included.

    Args:
        path: A file of one JSON object per line. Blank lines, and a last line that was only
            half-written, are left out.

    Yields:
        The line's number, from 1, and its object. One line is in memory at a time.

    Raises:
        LogError: If the file cannot be opened, or a line is longer than 64 MiB or not a JSON
            object.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "run.jsonl")
        ...     _ = path.write_text('{"run": {}}\n{"step": 1}\n{"st')
        ...     list(iterate(path))
        [(1, {'run': {}}), (2, {'step': 1})]
    """
    return ((number, found) for number, found in _objects(path) if found is not None)


def read_jsonl(path: str | Path) -> list[Row]:
    r"""Return the rows of a log: each step once, without headers or a half-written last line.

    Args:
        path: A file that :func:`sphereopt.track` wrote.

    Returns:
        The rows in the order of their steps. Where a resumed run made steps again, the later rows
        count; rows of one step from several optimizers are merged.

    Raises:
        LogError: If the file cannot be opened, or a line is not a JSON object.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "run.jsonl")
        ...     _ = path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "resumed": true}\n')
        ...     read_jsonl(path)
        [{'step': 1}, {'step': 2, 'resumed': True}]
    """
    return [row for _, row in Rows(path)]


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    try:
        with Path(path).open("rb") as file:
            start = file.peek(4)
            for magic, what in _OTHERS.items():
                if start.startswith(magic):
                    raise LogError(f"{path}: {what}")
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    most = f"{LONGEST_LINE // 2**20} MiB"
                    raise LogError(f"{path}, line {number}: longer than {most}, so not a log")
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except OSError as error:
        raise LogError(f"{path}: {error.strerror or error}") from error


def _objects(path: str | Path) -> Iterator[tuple[int, Row | None]]:
    """Yield the object of every line, None for a half-written last one."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            # Not json.loads(line): that guesses encodings.
            found = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n") and line.lstrip()[:1] in (b"{", b"\0"):
                yield number, None
                return
            raise LogError(f"{path}, line {number}: {_complaint(line, error)}") from None
        if not isinstance(found, dict):
            kind = "an array" if isinstance(found, list) else "a value"
            raise LogError(f"{path}, line {number}: {kind} where a JSON object belongs")
        yield number, found


def _complaint(line: bytes, error: Exception) -> str:
    """Return what is wrong with a line."""
    if b"\0" in line:
        return "holds NUL bytes, as after a loss of power; delete the line"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start + 1}); is this a binary file?"
    if isinstance(error, RecursionError):
        return "nested too deeply for a log"
    if not isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error})"
    text = error.doc.rstrip()
    if text.startswith("{") and (error.pos >= len(text) or error.msg.startswith("Unterminated")):
        return f"cut off after {len(text)} characters, with more lines after it; delete the line"
    shown = text if len(text) <= 40 else text[:37] + "..."
    return f"not JSON ({error.msg} at character {error.colno}): {shown}"


def _rewinds(
    rows: Iterable[tuple[int, bytes | Mapping[str, Any]]],
) -> tuple[list[tuple[int, int]], int]:
    """Return where steps are made again, and the last line's number.

    A rewind (n, s) supersedes rows before line n from step s on. They come last one first, and
    those that a later one makes needless are left out: both numbers fall from one to the next.
    """
    found: list[tuple[int, int]] = []
    last: int | None = None
    names: set[str] = set()
    first: bytes | Mapping[str, Any] = {}
    number = 0
    for number, row in rows:
        step = _step(row)
        if step is None:
            continue
        if last is None or step > last:
            first, names = row, set()
        else:
            names = names or _names(first)
            if step < last or not names.isdisjoint(_names(row)):
                while found and found[-1][1] >= step:
                    found.pop()
                found.append((number, step))
                first, names = row, set()
            else:
                names |= _names(row)
        last = step
    return found[::-1], number


def _step(row: bytes | Mapping[str, Any]) -> int | None:
    """Return a row's step, None for what is no row; lines of ours are not parsed for it."""
    if isinstance(row, bytes):
        if match := _STEP.match(row):
            return int(match[1])
        row = loaded(row)
    step = row.get("step") if isinstance(row, Mapping) else None
    return step if type(step) is int else None


def _names(row: bytes | Mapping[str, Any]) -> set[str]:
    row = loaded(row) if isinstance(row, bytes) else row
    parameters = row.get("parameters")
    return set(parameters) if isinstance(parameters, Mapping) else set()


def loaded(line: bytes) -> Row:
    """Return the object of a line, an empty one if it holds none.

    Args:
        line: A line of a file.

    Returns:
        Its object.

    Example:
        >>> loaded(b'{"step": 1}'), loaded(b'{"st')
        ({'step': 1}, {})
    """
    with suppress(ValueError, RecursionError):
        found = json.loads(line.decode())
        return found if isinstance(found, dict) else {}
    return {}


def check_row(row: Mapping[str, Any], where: str) -> None:
    """Raise if an object is not a row of a log.

    Args:
        row: The object.
        where: File and line, for the message.

    Raises:
        LogError: If there is no integer step, no table of parameters, or a probe that is not a
            table of numbers.

    Example:
        >>> check_row({"epoch": 1, "loss": 0.3}, "run.jsonl, line 1")
        Traceback (most recent call last):
            ...
        sphereopt.monitor.rows.LogError: run.jsonl, line 1: not a row of sphereopt: needs "step"
        and "parameters", has "epoch", "loss"
    """
    if "step" not in row or "parameters" not in row:
        has = ", ".join(f'"{key}"' for key in list(row)[:5]) or "nothing"
        more = " ..." if len(row) > 5 else ""
        needs = 'needs "step" and "parameters"'
        raise LogError(f"{where}: not a row of sphereopt: {needs}, has {has}{more}")
    if type(row["step"]) is not int or not 0 <= row["step"] < 2**63:
        raise LogError(f"{where}: the step is {_shown(row['step'])}, not a whole number")
    metrics = row.get("metrics") or {}
    if not isinstance(metrics, Mapping) or not _NUMBERS.issuperset(map(type, metrics.values())):
        raise LogError(f"{where}: the metrics are {_shown(metrics)}, not a table of numbers")
    if not isinstance(row["parameters"], Mapping):
        raise LogError(f"{where}: the parameters are {_shown(row['parameters'])}, not a table")
    for name, entry in row["parameters"].items():
        if not isinstance(entry, Mapping):
            raise LogError(f"{where}, parameter {name}: {_shown(entry)} is not a table of probes")
        for key, value in entry.items():
            _check_value(key, value, f"{where}, parameter {name}")


def _check_value(key: str, value: Any, where: str) -> None:
    if key in ("sphere", "kind"):
        good, what = value is None or isinstance(value, str), "a string"
    elif key in ("lr", "weight_decay", "count"):
        good, what = type(value) in _NUMBERS, "a number"
    else:
        good = isinstance(value, dict) and _NUMBERS.issuperset(map(type, value.values()))
        what = "a table of numbers"
    if not good:
        raise LogError(f"{where}: {key} is {_shown(value)}, not {what}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _of_one_step(one: Row, other: Row) -> bool:
    step = _step(one)
    return step is not None and step == _step(other)


def _merged(one: Row, other: Row) -> Row:
    """Return a row with the parameters and the metrics of both."""
    both = {**one, **other}
    for key in ("metrics", "parameters"):
        tables = [row[key] for row in (one, other) if isinstance(row.get(key), Mapping)]
        if tables:
            both[key] = {name: value for table in tables for name, value in table.items()}
    return both
