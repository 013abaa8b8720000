"""What was set otherwise in two runs: options, spheres, schedules, versions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sphereopt.moves import RADIANS
from sphereopt.report.diff.align import Aligned
from sphereopt.report.history import History
from sphereopt.report.series import Array

__all__ = ["Change", "changes", "members", "options", "other_units"]

#: How the same numbers are computed; nothing that a run's course should depend on.
_MEANS = {"foreach", "fused", "capturable", "differentiable", "initial_lr"}
#: What says nothing of a parameter that is on no sphere.
_OF_SPHERES = {"kind", "joint", "radius", "move", "transport"}
_SCHEDULED = ("lr", "weight_decay")
_ABOUT_LOG = ("device", "sphereopt", "window", "every", "probes")


@dataclass(frozen=True)
class Change:
    """One thing that was set otherwise.

    Attributes:
        what: Name of the option.
        a: Value in the first run, None if it is not set there.
        b: Value in the second.
        names: Parameters concerned; empty for what concerns the run.
        since: First step of which it holds, None for the whole run.
        until: Last step of which it holds, None if it holds to the end.
        counts: Whether it could make the runs differ; versions, machine and the user's own notes
            are said, but two runs that differ in them alone are the same.
    """

    what: str
    a: Any
    b: Any
    names: tuple[str, ...] = ()
    since: int | None = None
    until: int | None = None
    counts: bool = True


def changes(a: History, b: History, on: Aligned) -> tuple[Change, ...]:
    """Return what was set otherwise, what counts first.

    Args:
        a: The first log.
        b: The second.
        on: Their common steps, for schedules.

    Returns:
        One change for all parameters of which the same is true. Groups are matched by the names of
        their parameters, so that groups split otherwise are the same if every parameter has the
        same options. An option that is not set is the same as one that is off.
    """
    merged: dict[str, Change] = {}
    for one in (*_schedules(a, b, on), *_options(a, b), *_run_level(a, b)):
        place = _canonical([one.what, one.a, one.b, one.since, one.until])
        before = merged.get(place)
        merged[place] = one if before is None else replace(one, names=before.names + one.names)
    return tuple(sorted(merged.values(), key=lambda x: (not x.counts, x.what != "optimizer")))


def members(name: str) -> list[str]:
    """Return the parameters of a sphere, which are several if it is a joint one."""
    return name.split(" + ")


def options(history: History) -> dict[str, dict[str, Any]]:
    """Return the options of each parameter as the run began with them.

    Args:
        history: The log.

    Returns:
        Parameter to options, with ``optimizer`` and ``rule`` among them; empty without a header.
        A resume's header would tell rates in the middle of a schedule, so the first one counts.
    """
    found: dict[str, dict[str, Any]] = {}
    for run in history.runs:
        for group in _tables(run.get("groups")):
            about = {"optimizer": run.get("optimizer"), "rule": run.get("rule")}
            given = about | {key: value for key, value in group.items() if key != "names"}
            names = group.get("names")
            for name in names if isinstance(names, list) else ():
                found.setdefault(str(name), given)
    return found


def other_units(a: History, b: History, names: Iterable[str]) -> set[str]:
    """Return layers whose effective learning rates are in other units in the two runs.

    They are per unit of the optimizer's direction, and a move in radians needs none.
    """
    first, second = options(a), options(b)
    found = set()
    for name in names:
        member = members(name)[0]
        if member in first and member in second:
            one, two = first[member], second[member]
            turns = (one.get("move") in RADIANS) != (two.get("move") in RADIANS)
            if turns or one.get("rule") != two.get("rule"):
                found.add(name)
    return found


def _tables(value: Any) -> list[dict[str, Any]]:
    return [x for x in value if isinstance(x, dict)] if isinstance(value, list) else []


def _options(a: History, b: History) -> Iterator[Change]:
    """Changes of options, by parameter; of tracked ones the schedules tell rate and decay."""
    first, second = options(a), options(b)
    tracked = {x for name in {*a.names} & {*b.names} for x in members(name)}
    shared: dict[tuple[str, str, str], tuple[Any, Any, list[str]]] = {}
    if not first or not second:
        first, second = _about(a), _about(b)
    for name in (x for x in first if x in second):
        one, two = first[name], second[name]
        plain = one.get("sphere") is None and two.get("sphere") is None
        for key in (*one, *(key for key in two if key not in one)):
            told = key == "rule" or (key in _SCHEDULED and name in tracked)
            if told or (plain and key in _OF_SPHERES):
                continue
            x, y = one.get(key), two.get(key)
            if _differ(x, y):
                place = (key, _canonical(x), _canonical(y))
                shared.setdefault(place, (x, y, []))[2].append(name)
    for (key, *_), (x, y, names) in shared.items():
        yield Change(key, x, y, tuple(names), counts=key not in _MEANS)


def _about(history: History) -> dict[str, dict[str, Any]]:
    """Return what the rows themselves say of each sphere."""
    return {name: dict(about) for name, about in history.about.items()}


def _differ(x: Any, y: Any) -> bool:
    if x is None or y is None:
        return not (_is_off(x) and _is_off(y))
    if _canonical(x) == _canonical(y):
        return False
    # Adding 0.1 ten times is 1 to rounding.
    return not (_is_number(x) and _is_number(y) and abs(x - y) <= 1e-12 * max(abs(x), abs(y)))


def _is_off(x: Any) -> bool:
    return not x or x in ("none", "nearest")


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _canonical(value: Any) -> str:
    if _is_number(value):
        value = float(value)
    return json.dumps(value, sort_keys=True, default=str)


def _schedules(a: History, b: History, on: Aligned) -> Iterator[Change]:
    """Changes of rate and decay at each step, one for all layers that have the same."""
    if not len(on.steps):
        return
    # Between logged steps rates are interpolated, and a warm-up is not a straight line.
    passes = 0.1 if on.interpolated else 1e-9
    for what in _SCHEDULED:
        shared: dict[tuple[Any, ...], list[str]] = {}
        one, two = on.a.of(a.settings[what]), on.b.of(b.settings[what])
        for name in on.names:
            x, y = one[:, a.names.index(name)], two[:, b.names.index(name)]
            found = _schedule(x, y, passes)
            if found is not None:
                rows, ends = found
                shared.setdefault((*rows, *ends), []).append(name)
        for (start, stop, x, y), names in shared.items():
            since = None if start == 0 else int(on.steps[start])
            until = None if stop == len(on.steps) - 1 else int(on.steps[stop])
            yield Change(what, x, y, tuple(names), since, until)


def _schedule(
    x: Array, y: Array, passes: float
) -> tuple[tuple[int, int], tuple[float, float]] | None:
    """Return first and last row in which two schedules differ, and where they differ most."""
    gap = np.abs(x - y)
    rows = np.flatnonzero(gap > passes * np.maximum(np.abs(x), np.abs(y)))
    if not rows.size:
        return None
    top, last = int(np.nanargmax(gap)), int(rows[-1])
    # Schedules that end at zero are alike there, whatever they were.
    if not (np.any(x[last + 1 :]) or np.any(y[last + 1 :])):
        last = len(x) - 1
    return (int(rows[0]), last), (float(x[top]), float(y[top]))


def _run_level(a: History, b: History) -> Iterator[Change]:
    """Changes in what headers say of the whole run."""
    if not a.runs or not b.runs:
        return
    one, two = a.runs[0], b.runs[0]
    if not (options(a) and options(b)) and one.get("optimizer") != two.get("optimizer"):
        yield Change("optimizer", one.get("optimizer"), two.get("optimizer"))
    for part in ("config", "versions"):
        x, y = (dict(_flat(run.get(part))) for run in (one, two))
        for key in sorted({*x, *y}):
            if _canonical(x.get(key, None)) != _canonical(y.get(key, None)):
                yield Change(f"{part}.{key}", x.get(key), y.get(key), counts=False)
    for key in _ABOUT_LOG:
        if _canonical(one.get(key)) != _canonical(two.get(key)):
            yield Change(key, one.get(key), two.get(key), counts=False)


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the leaves of nested tables with dotted names."""
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
