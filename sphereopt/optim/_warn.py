"""Warnings that point to the line of the user, however many frames of ours lie between."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_user"]

_OURS = ("sphereopt", "torch")


def warn_user(message: str) -> None:
    """Warn, as from the nearest line that is neither this package's nor torch's.

    Args:
        message: The text.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
