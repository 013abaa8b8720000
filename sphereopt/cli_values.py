"""What several commands ask: whether a number is one, and whether packages are there."""

from __future__ import annotations

import argparse
import importlib.util

__all__ = ["needs_report", "real"]


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


def needs_report(parser: argparse.ArgumentParser) -> None:
    """Leave with one line if what the pages are made with is not installed."""
    needed = ("matplotlib", "jinja2")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        parser.error(f'{", ".join(missing)} not installed; run: pip install "sphereopt[report]"')
