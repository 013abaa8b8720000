"""JSON lines: one object per logged step, on disk as soon as it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sphereopt.monitor.lines import LineFile
from sphereopt.monitor.rows import LogError, Row, iterate, loaded, read_jsonl

__all__ = ["JsonlSink", "LogError", "finite", "iterate", "read_jsonl"]


class JsonlSink:
    """A file that takes one JSON object per line and survives a crash in the middle of one.

    Args:
        path: The file; its folder is made. An existing log is continued, after dropping a last
            line that a crash left half-written.

    Raises:
        ValueError: If the file holds something else than a log; it is left as it is.
        OSError: If the file cannot be opened.

    Notes:
        A line is handed to the operating system in one piece before the call returns, so a killed
        process loses nothing. It is not forced to the disk (no ``fsync``): a machine that loses
        power may lose the last seconds.
        A write that fails, on a full disk for instance, is taken back before the error is raised.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = JsonlSink(folder + "/run.jsonl")
        ...     sink({"step": 1})
        ...     sink.close()
        ...     read_jsonl(folder + "/run.jsonl")
        [{'step': 1}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = LineFile(path, _is_log, is_whole=lambda line: bool(loaded(line)))

    def start(self, run: dict[str, Any]) -> None:
        """Write the header of a run, ``{"run": {...}}``."""
        self({"run": run})

    def __call__(self, row: Row) -> None:
        """Write one row and hand it to the operating system."""
        try:
            line = _dumps(row)
        except ValueError:
            # NaN is not JSON: strict readers refuse the file, so it becomes null.
            line = _dumps(finite(row))
        self._file.append(line.encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _dumps(row: Row) -> str:
    return json.dumps(row, allow_nan=False, separators=(",", ":"))


def finite(value: Any) -> Any:
    """Return a value with None for every number in it that is not finite.

    Args:
        value: Numbers, strings, lists and dicts of them.

    Returns:
        The same, NaN and infinities replaced.

    Example:
        >>> finite({"angle": [0.1, float("nan")]})
        {'angle': [0.1, None]}
    """
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _is_log(start: bytes) -> bool:
    """Whether a file begins with a header or a row, or with what a crash left of one."""
    first, newline, _ = start.partition(b"\n")
    return not {"run", "step"}.isdisjoint(loaded(first)) if newline else first[:1] == b"{"
