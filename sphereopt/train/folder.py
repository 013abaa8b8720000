"""A folder for what a run leaves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile

from sphereopt.train.config import OptionError

__all__ = ["fresh_folder"]


def fresh_folder(out: Path, files: Iterable[str]) -> Path:
    """Return the folder, made if need be and without what an earlier run left.

    Args:
        out: The folder.
        files: Names of files that a run leaves there; all else is left alone.

    Raises:
        OptionError: If nothing can be written there; the option is called ``out``.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in files:
            (out / name).unlink(missing_ok=True)
        with TemporaryFile(dir=out):  # that it was there before does not say it can be written to
            pass
    except OSError as error:
        remedy = f"cannot write there ({error.strerror}); choose another folder"
        raise OptionError("out", out, remedy) from None
    return out
