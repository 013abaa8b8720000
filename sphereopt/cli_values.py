"""Numbers on the command line."""

from __future__ import annotations

import argparse

__all__ = ["real"]


def real(text: str) -> float:
    """Return a number, or raise the error that argparse prints in one line.

    Example:
        >>> real("3e-4")
        0.0003
    """
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; use one like 0.01") from None
