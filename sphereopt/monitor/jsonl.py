"""JSON lines: one object per logged step, on disk as soon as it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["JsonlSink", "read_jsonl"]


class JsonlSink:
    """A file that takes one JSON object per line and survives a crash in the middle of one.

    Args:
        path: The file; its folder is made. An existing file is continued, after dropping a last
            line that a crash left half-written.

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+")
        self._drop_half_line()

    def _drop_half_line(self) -> None:
        end = position = self._file.seek(0, 2)
        while position > 0:
            start = max(0, position - 65536)
            self._file.seek(start)
            newline = self._file.read(position - start).rfind(b"\n")
            if newline >= 0 or start == 0:
                keep = start + newline + 1
                if keep < end:
                    self._file.truncate(keep)
                return
            position = start

    def __call__(self, row: dict[str, Any]) -> None:
        """Write one row and hand it to the operating system."""
        # NaN is not JSON: strict readers refuse the file, so it becomes null.
        line = json.dumps(_finite(row), allow_nan=False, separators=(",", ":"))
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a file, without a last line that was only half-written.

    Args:
        path: A file of one JSON object per line.

    Returns:
        The rows, in order.

    Raises:
        ValueError: If a line other than the last is not JSON; the message names it.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error.msg}") from None
    return rows
