"""A log as one table, a line per step and parameter: CSV and Parquet."""

from __future__ import annotations

import csv
import importlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sphereopt.monitor.jsonl import JsonlSink, finite
from sphereopt.monitor.lines import LineFile
from sphereopt.monitor.rows import Row, Rows, check_row
from sphereopt.monitor.summary import STATS

__all__ = ["CsvSink", "ParquetSink", "columns", "lines", "to_parquet"]

_METRIC = ("step", "metric", "value")
_ENTRY = ("sphere", "kind", "lr", "weight_decay", "count")
_BATCH = 4096


def columns(probes: Iterable[str]) -> list[str]:
    """Return the names of a table's columns.

    Args:
        probes: Names of the probes.

    Returns:
        The fixed columns, then ``probe.stat`` of each probe.

    Example:
        >>> columns(["norm"])[8:]
        ['count', 'norm.mean', 'norm.min', 'norm.q25', 'norm.median', 'norm.q75', 'norm.max']
    """
    return [*_METRIC, "parameter", *_ENTRY, *(f"{p}.{stat}" for p in probes for stat in STATS)]


def lines(row: Row, probes: Sequence[str]) -> Iterator[list[Any]]:
    """Yield the lines of a row: one for each metric, one for each parameter.

    Args:
        row: A row of a log.
        probes: Names of the probes that have columns; what a line lacks is None.

    Yields:
        As many values as :func:`columns` has names.

    Notes:
        A metric has a line rather than a column because metrics may be logged at any time, while
        the columns of a file are fixed by its first line.

    Example:
        >>> row = {"step": 5, "metrics": {"loss": 0.3}, "parameters": {"w": {"lr": 0.1}}}
        >>> for line in lines(row, []):
        ...     print(line)
        [5, 'loss', 0.3, None, None, None, None, None, None]
        [5, None, None, 'w', None, None, 0.1, None, None]
    """
    row = finite(row)
    empty = [None] * (len(_ENTRY) + len(probes) * len(STATS))
    for name, value in row.get("metrics", {}).items():
        yield [row["step"], name, value, None, *empty]
    for name, entry in row["parameters"].items():
        values = [entry.get(p, {}).get(stat) for p in probes for stat in STATS]
        yield [row["step"], None, None, name, *(entry.get(key) for key in _ENTRY), *values]


class CsvSink:
    """A CSV file with a line per step and parameter, on disk as soon as it is written.

    Args:
        path: The file; its folder is made. An existing file is continued if it has the same
            columns, after dropping a last line that a crash left half-written.
        probes: Names of the probes; by default those of the run's header, or of the first row.

    Raises:
        ValueError: If the file is not such a table; here or, for other columns, in ``start``.

    Notes:
        What a resumed run made again is there twice, the later lines below: a file that is
        appended to cannot take lines back. JSON lines are read back without them.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "run.csv")
        ...     sink = CsvSink(path, probes=[])
        ...     sink({"step": 1, "parameters": {"w": {"sphere": "row", "lr": 0.1, "count": 8}}})
        ...     sink.close()
        ...     print(path.read_text())
        step,metric,value,parameter,sphere,kind,lr,weight_decay,count
        1,,,w,row,,0.1,,8
    """

    def __init__(self, path: str | Path, probes: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        title = ",".join(_METRIC).encode()
        self._file = LineFile(
            path, lambda start: start[: len(title)] in (title, title[: len(start)])
        )
        self._probes: Sequence[str] | None = None
        if probes is not None:
            self._begin(probes)

    def start(self, run: Mapping[str, Any]) -> None:
        """Write the first line, or check that of a file that is continued."""
        if self._probes is None:
            self._begin(run["probes"])

    def __call__(self, row: Row) -> None:
        """Write the lines of one row and hand them to the operating system."""
        present = _probes(row)
        if self._probes is None:
            self._begin(list(present))
        assert self._probes is not None
        if missing := [p for p in present if p not in self._probes]:
            raise ValueError(f"{self.path}: has no columns for {', '.join(missing)}")
        self._file.append(_csv(lines(row, self._probes)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _begin(self, probes: Sequence[str]) -> None:
        wanted, first = columns(probes), self._file.start().partition(b"\n")[0].decode()
        found = next(csv.reader([first]), [])
        if not found:
            self._file.append(_csv([wanted]))
        elif found != wanted:
            self.close()
            raise ValueError(
                f"{self.path}: has the columns of another log ({_apart(found, wanted)}); "
                "choose another path"
            )
        self._probes = probes


class ParquetSink:
    """A Parquet file, written when the run ends from the JSON lines kept beside it.

    Args:
        path: The file; its folder is made. ``run.parquet`` has its journal in ``run.jsonl``, which
            a resumed run continues and which remains.

    Raises:
        ImportError: If pyarrow is missing; the extra ``parquet`` brings it.
        ValueError: If the file or the journal holds something else than a log.

    Notes:
        A Parquet file is complete only with its end and cannot be appended to: a run that was
        killed leaves the journal, from which :func:`to_parquet` makes the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = ParquetSink(folder + "/run.parquet")
        ...     sink({"step": 1, "parameters": {}})
        ...     sink.close()
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['run.jsonl', 'run.parquet']
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _refuse_others(_pyarrow(), self.path)
        self.journal = JsonlSink(self.path.with_suffix(".jsonl"))
        self._open = True

    def start(self, run: dict[str, Any]) -> None:
        """Write the header of a run to the journal."""
        self.journal.start(run)

    def __call__(self, row: Row) -> None:
        """Write one row to the journal."""
        self.journal(row)

    def close(self) -> None:
        """Close the journal and write the file."""
        if self._open:
            self._open = False
            self.journal.close()
            to_parquet(self.journal.path, self.path)


def to_parquet(log: str | Path, path: str | Path) -> None:
    """Write a log of JSON lines as a Parquet table.

    Args:
        log: A file of JSON lines; rows that a resumed run superseded are left out.
        path: The file to write, with the columns of :func:`columns`; it appears when it is
            complete, in place of one that is there.

    Raises:
        ImportError: If pyarrow is missing; the extra ``parquet`` brings it.
        LogError: If the log cannot be read.
        ValueError: If there is a file that is not such a table; it is left as it is.
        OSError: If the file cannot be written.

    Notes:
        The log is read twice, for the columns and for the lines, a few thousand lines at a time.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = Path(folder, "run.jsonl")
        ...     _ = log.write_text('{"step": 1, "parameters": {"w": {"lr": 0.1}}}')
        ...     to_parquet(log, log.with_suffix(".parquet"))
    """
    pyarrow, path = _pyarrow(), Path(path)
    _refuse_others(pyarrow, path)
    rows = Rows(log)
    found: dict[str, None] = {}
    for number, row in rows:
        check_row(row, rows.where(number))
        found.update(_probes(row))
    probes = list(dict.fromkeys(p for run in rows.runs for p in run.get("probes", ()))) or []
    probes += [p for p in found if p not in probes]
    part = path.with_name(path.name + ".part")
    schema = _schema(pyarrow, columns(probes))
    try:
        with pyarrow.parquet.ParquetWriter(part, schema) as writer:
            for batch in _batches(line for _, row in rows for line in lines(row, probes)):
                writer.write_table(pyarrow.table(list(zip(*batch, strict=True)), schema=schema))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _apart(found: Sequence[str], wanted: Sequence[str]) -> str:
    """Return in words what two lists of columns differ in."""
    there, here = ({name.rpartition(".")[0] or name for name in x} for x in (found, wanted))
    parts = [
        f"{what} {', '.join(sorted(names))}"
        for what, names in (("only it has", there - here), ("it lacks", here - there))
        if names
    ]
    return "; ".join(parts) or "in another order"


def _pyarrow() -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        raise ImportError('Parquet needs pyarrow; run: pip install "sphereopt[parquet]"') from None


def _refuse_others(pyarrow: Any, path: Path) -> None:
    """Raise if there is a file that is not a table of ours: writing would replace it."""
    if not path.exists():
        return
    try:
        names = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError):
        names = []
    if names[: len(_METRIC)] != list(_METRIC):
        raise ValueError(f"{path}: holds something else than a log; choose another path")


def _schema(pyarrow: Any, names: Sequence[str]) -> Any:
    text = dict.fromkeys(("metric", "parameter", "sphere", "kind"), pyarrow.string())
    kinds = {**text, **dict.fromkeys(("step", "count"), pyarrow.int64())}
    return pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in names])


def _batches(found: Iterable[list[Any]]) -> Iterator[list[list[Any]]]:
    batch: list[list[Any]] = []
    for line in found:
        batch.append(line)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _probes(row: Row) -> dict[str, None]:
    """Return the names of a row's probes, in order of appearance."""
    entries = row["parameters"].values()
    return {key: None for entry in entries for key, value in entry.items() if type(value) is dict}


def _csv(found: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(found)
    return text.getvalue().encode()
