"""Values that a formula cannot be used with."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["LARGEST", "OutOfRangeError", "number", "whole"]

#: Rates and norms beyond this are typing errors, and their squares would overflow.
LARGEST = 1e50


class OutOfRangeError(ValueError):
    """A value that a formula cannot be used with.

    Attributes:
        name: The argument.
        value: What it was.
        remedy: What it must be.
    """

    def __init__(self, name: str, value: object, remedy: str) -> None:
        super().__init__(f"{name}={value!r} {remedy}")
        self.name, self.value, self.remedy = name, value, remedy


def number(
    name: str,
    value: Any,
    *,
    low: float = -LARGEST,
    above: float = -math.inf,
    below: float = LARGEST,
) -> float:
    """Return a float in ``[low, below)`` and over ``above``, or raise OutOfRangeError."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise OutOfRangeError(name, value, "must be a number") from None
    if not (low <= result < below and result > above):
        least = "positive" if above == 0 else f"{low:g} or more"
        most = f"below {below:g}" if below <= result < math.inf or below < LARGEST else "finite"
        raise OutOfRangeError(name, value, f"must be {least} and {most}")
    return result


def whole(name: str, value: Any, *, low: int) -> int:
    """Return an int that is at least ``low``, or raise OutOfRangeError."""
    if isinstance(value, bool) or int(number(name, value)) != value or value < low:
        raise OutOfRangeError(name, value, f"must be a whole number, {low} or more")
    return int(value)
