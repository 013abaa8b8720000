"""A file that is only ever appended to, in whole lines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sphereopt.monitor.rows import LONGEST_LINE

__all__ = ["LineFile"]

_BLOCK = 65536


class LineFile:
    """A file of lines: what is appended is with the operating system before the call returns.

    A write that fails is taken back, and so is, at opening, the half line that a crash left.

    Args:
        path: The file; its folder is made.
        recognize: Takes the first bytes of an existing file, False if they are not ours: then
            the file is left as it is.
        is_whole: Takes a last line without a newline, True if nothing of it is missing.

    Raises:
        ValueError: If the file is not recognized.
        OSError: If it cannot be opened.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "lines")
        ...     _ = path.write_bytes(b"one|tw".replace(b"|", bytes([10])))
        ...     file = LineFile(path, lambda start: True)
        ...     file.append(b"three" + bytes([10]))
        ...     file.close()
        ...     path.read_text().split()
        ['one', 'three']
    """

    def __init__(
        self,
        path: str | Path,
        recognize: Callable[[bytes], bool],
        is_whole: Callable[[bytes], bool] = lambda line: False,
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._is_whole, self._torn = is_whole, False
        # Unbuffered: a buffer would keep a line whose write failed, and write it later, again.
        self._file = self.path.open("ab+", buffering=0)
        try:
            start = self.start()
            if start and not recognize(start):
                raise ValueError(f"{self.path}: holds something else than a log; use another path")
            self._mend()
        except BaseException:
            self._file.close()
            raise

    def start(self) -> bytes:
        """Return the first bytes, without a byte order mark and what a loss of power leaves."""
        self._file.seek(0)
        return self._file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip(b"\0 \r\n")

    def append(self, lines: bytes) -> None:
        """Append whole lines, all or none."""
        if self._torn:
            self._mend()
        end = self._file.seek(0, 2)
        self._torn = True
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
            self._torn = False
        finally:
            if self._torn:
                with suppress(OSError):
                    self._file.truncate(end)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _mend(self) -> None:
        """Make the file end with a whole line."""
        end = self._file.seek(0, 2)
        keep = self._after_last_newline(end)
        self._file.seek(keep)
        if keep < end and end - keep < LONGEST_LINE and self._is_whole(self._file.read(end - keep)):
            self._file.write(b"\n")
        else:
            self._file.truncate(keep)
        self._torn = False

    def _after_last_newline(self, position: int) -> int:
        while position > 0:
            start = max(0, position - _BLOCK)
            self._file.seek(start)
            newline = self._file.read(position - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            position = start
        return 0
