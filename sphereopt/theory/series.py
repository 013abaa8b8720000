"""Constants and sequences as arrays with one number for each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sphereopt.theory.errors import LARGEST, OutOfRangeError, whole
from sphereopt.theory.moments import Array

__all__ = ["Numbers", "series"]

#: A constant, or one number for each step.
Numbers = float | Sequence[float] | Array


def series(steps: int | None, **given: Any) -> dict[str, Array]:
    """Return arrays of one length.

    Args:
        steps: Their length; ``None`` if one of the values has one number for each step.
        **given: Each a constant or one number for each step, by name.

    Returns:
        New arrays of shape (steps,), by name.

    Raises:
        OutOfRangeError: If a number is negative or not finite, or lengths do not agree.

    Example:
        >>> series(None, lr=[0.1, 0.2], weight_decay=0.5)["weight_decay"].tolist()
        [0.5, 0.5]
    """
    arrays = {name: _array(name, value) for name, value in given.items()}
    lengths = {len(x) for x in arrays.values() if x.ndim}
    if steps is not None:
        lengths.add(steps)
    if len(lengths) != 1:
        said = " and ".join(map(str, sorted(lengths))) or "nothing"
        remedy = f"must be given, and {', '.join(given)} be constants or of that length: they say "
        raise OutOfRangeError("steps", steps, remedy + said)
    count = whole("steps", lengths.pop(), low=1)
    return {name: np.broadcast_to(x, count).copy() for name, x in arrays.items()}


def _array(name: str, value: Any) -> Array:
    try:
        x = np.asarray(value, float)
    except (TypeError, ValueError):
        raise OutOfRangeError(name, value, "must be a number, or one for each step") from None
    if x.ndim > 1:
        raise OutOfRangeError(name, x.shape, "is the shape; must be a number, or one for each step")
    fits = (x >= 0) & (x < LARGEST)
    if not np.all(fits):
        wrong = float(x[~fits][0]) if x.ndim else float(x)
        raise OutOfRangeError(name, wrong, "must be finite and not negative")
    return x
