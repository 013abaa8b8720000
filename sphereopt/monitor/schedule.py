"""Which steps are logged, and which parameters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

__all__ = ["Every", "Names", "Schedule", "chosen"]

Every = int | Mapping[int, int]
Names = str | Iterable[str] | Callable[[str], bool] | None


class Schedule:
    """Dense early, sparse later: from which step on every how many are logged.

    Args:
        every: Log every this many steps; or a mapping of steps to that, ``{0: 1, 100: 50}``: every
            step from the first, every 50th from step 100 on.

    Raises:
        ValueError: If a number is not whole and positive, or nothing is said of the first steps.

    Example:
        >>> schedule = Schedule({0: 1, 3: 5})
        >>> [step for step in range(1, 16) if step in schedule]
        [1, 2, 5, 10, 15]
    """

    def __init__(self, every: Every) -> None:
        table = dict(every) if isinstance(every, Mapping) else {0: every}
        for start, period in table.items():
            if not isinstance(period, int) or period < 1:
                raise ValueError(f"every={every} must be 1 or more")
            if not isinstance(start, int) or start < 0:
                raise ValueError(f"every={every} must map steps, from 0, to numbers of steps")
        if 0 not in table:
            raise ValueError(f"every={every} must say what holds from step 0: {{0: 1, ...}}")
        self.table = dict(sorted(table.items()))
        self._starts, self._periods = list(self.table), list(self.table.values())

    def __contains__(self, step: int) -> bool:
        return step % self._periods[bisect_right(self._starts, step) - 1] == 0


def chosen(names: Names, skip: Names) -> Callable[[str], bool]:
    """Return whether a parameter is logged, from what to keep and what to leave out.

    Args:
        names: A name, a glob (``"layer4.*"``), several of them, or a predicate; None is all.
        skip: Likewise; None is none.

    Returns:
        A function of the name; of the members' names joined by " + " for a joint sphere.

    Example:
        >>> keep = chosen("layer*", skip=lambda name: name.endswith(".bias"))
        >>> [name for name in ("fc.weight", "layer1.weight", "layer1.bias") if keep(name)]
        ['layer1.weight']
    """
    wanted, unwanted = _matcher(names, True), _matcher(skip, False)
    return lambda name: wanted(name) and not unwanted(name)


def _matcher(names: Names, default: bool) -> Callable[[str], bool]:
    if names is None:
        return lambda name: default
    if callable(names):
        return names
    globs = [names] if isinstance(names, str) else list(names)
    return lambda name: any(fnmatchcase(name, glob) for glob in globs)
