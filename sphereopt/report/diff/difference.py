"""What changed between two runs: settings, parameters, dynamics, metrics, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sphereopt.report.diff.align import Aligned, aligned
from sphereopt.report.diff.cause import Prediction, predictions
from sphereopt.report.diff.course import MEASURES, Course, Measure, apart, course
from sphereopt.report.diff.settings import Change, changes, other_units
from sphereopt.report.diff.text import as_json, as_text
from sphereopt.report.diff.verdict import verdict
from sphereopt.report.history import History, as_history
from sphereopt.report.series import Array

__all__ = ["TOLERANCE", "Diff", "Layer", "Lost", "Metric", "diff"]

#: Layers of few spheres may truly differ by more between two seeds.
TOLERANCE = 0.1
#: Relative difference that is rounding: a hundred units in the last place of float32.
_ROUNDING = 1e-5
#: Runs whose numbers come and go are not broken; those without any in the last tenth are.
_LAST = 0.1
_SENTENCES = 3

Log = str | Path | Sequence[Mapping[str, Any]] | History
Same = Literal["identical", "rounding", "tolerance"]


@dataclass(frozen=True)
class Lost:
    """A run that has no numbers of a layer from a step to the end, while the other one has.

    Attributes:
        run: ``"a"`` or ``"b"``.
        step: The first step without.
    """

    run: str
    step: int


@dataclass(frozen=True)
class Layer:
    """How one layer of b stands to that of a.

    Attributes:
        name: The parameter.
        courses: Probe to :class:`~sphereopt.report.diff.course.Course`, for what both logs have.
        lost: Set if one run has no numbers at the end.
        predicted: What options alone make of it, by the calculator; None where it does not say.
    """

    name: str
    courses: Mapping[str, Course]
    lost: Lost | None = None
    predicted: Prediction | None = None

    @property
    def parted(self) -> bool:
        """Whether anything of it differs beyond tolerance and noise."""
        return self.lost is not None or any(one.parted for one in self.courses.values())

    @property
    def since(self) -> int | None:
        """First step of which something differs, None if that is not known or nothing does."""
        found = [one.since for one in self.courses.values() if one.since is not None]
        found += [] if self.lost is None else [self.lost.step]
        return min(found, default=None)

    @property
    def size(self) -> float:
        """How far it is apart, for ranking: in units of what passes as the same."""
        if self.lost is not None:
            return math.inf
        return max((one.size for one in self.courses.values() if one.parted), default=0.0)


@dataclass(frozen=True)
class Metric:
    """One metric of both runs; of each its last stretch's median, lowest and highest, or None.

    Attributes:
        name: As given to ``tracker.log``.
        a: (last, lowest, highest) of all that the first run logged.
        b: Of the second.
        course: How b stands to a on the common steps.
    """

    name: str
    a: tuple[float, float, float] | None
    b: tuple[float, float, float] | None
    course: Course | None


@dataclass(frozen=True)
class Diff:
    """What changed from run a to run b.

    Attributes:
        a: The first log.
        b: The second.
        tolerance: Ratios within ``1 + tolerance`` pass as the same.
        same: ``"identical"`` (all numbers and settings), ``"rounding"`` (medians agree to 1e-5),
            ``"tolerance"`` (nothing that counts differs), or None.
        verdict: One to three sentences.
        changes: What was set otherwise.
        only_a: Parameters that only the first run tracks.
        only_b: Those of the second.
        layers: Those of both, the farthest apart first.
        metrics: What the user logged.
        steps: How many steps are compared, the first and the last.
        notes: What to know of the comparison.
    """

    a: History
    b: History
    tolerance: float
    same: Same | None
    verdict: tuple[str, ...]
    changes: tuple[Change, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    layers: tuple[Layer, ...]
    metrics: tuple[Metric, ...]
    steps: tuple[int, int, int]
    notes: tuple[str, ...] = field(default=())

    @property
    def differs(self) -> bool:
        """Whether anything that counts differs beyond tolerance."""
        return self.same is None

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values that JSON can hold; see :mod:`sphereopt.report.diff.text`."""
        return as_json(self)

    def __str__(self) -> str:
        return as_text(self)


def diff(a: Log, b: Log, *, tolerance: float = TOLERANCE) -> Diff:
    """Return what changed between two runs.

    Args:
        a: The run to compare with: path of a JSONL file, rows, or a
            :class:`~sphereopt.report.History`.
        b: The other one; ratios are b/a.
        tolerance: Ratios within ``1 + tolerance``, up or down, pass as the same.

    Returns:
        The difference; ``str`` of it is text, ``as_json()`` plain values.

    Raises:
        ValueError: If a log cannot be read, or the tolerance is not a positive number.

    Notes:
        A layer counts with the median over its spheres. Dynamics are compared on the steps that
        both logs have; see :func:`~sphereopt.report.diff.align.aligned`. What counts as apart has
        to be so beyond noise; see :func:`~sphereopt.report.diff.course.course`. A cause is named
        only where :func:`~sphereopt.report.diff.cause.predictions` supports it.

    Example:
        >>> def run(size):
        ...     entry = {"norm": {"median": size}}
        ...     return [{"step": i, "parameters": {"conv.weight": entry}} for i in range(1, 9)]
        >>> found = diff(run(1.0), run(2.0))
        >>> found.layers[0].courses["norm"].late
        2.0
        >>> print(found.verdict[0])
        Over the second half b's norms are 2x a's; no header says why.
    """
    if not (isinstance(tolerance, int | float) and 0 < tolerance < math.inf):
        raise ValueError(f"tolerance={tolerance!r} must be a positive number, such as 0.1 for 10 %")
    one, two = as_history(a), as_history(b)
    on = aligned(one, two)
    layers, equal = _layers(one, two, on, tolerance)
    found = Diff(
        a=one,
        b=two,
        tolerance=tolerance,
        same=None,
        verdict=(),
        changes=changes(one, two, on),
        only_a=_only(one, two),
        only_b=_only(two, one),
        layers=layers,
        metrics=_metrics(one, two, on, tolerance),
        steps=(len(on.steps), int(on.steps[0]), int(on.steps[-1])) if len(on.steps) else (0, 0, 0),
        notes=tuple(_notes(one, two, on)),
    )
    found = replace(found, same=_same(found, equal))
    return replace(found, verdict=tuple(verdict(found, on))[:_SENTENCES])


def _only(one: History, other: History) -> tuple[str, ...]:
    others = set(other.names)
    return tuple(name for name in one.names if name not in others)


def _layers(
    a: History, b: History, on: Aligned, tolerance: float
) -> tuple[tuple[Layer, ...], bool]:
    """Return the layers of both runs, and whether all their medians agree to rounding."""
    courses: dict[str, dict[str, Course]] = {name: {} for name in on.names}
    units = other_units(a, b, on.names)
    equal = True
    places = [[history.names.index(name) for name in on.names] for history in (a, b)]
    for measure in MEASURES:
        probe = measure.probe
        if probe not in a.values or probe not in b.values or not len(on.steps):
            continue
        one, two = on.a.of(a.of(probe))[:, places[0]], on.b.of(b.of(probe))[:, places[1]]
        values = apart(one, two, measure.scale is None)
        equal &= bool(np.all(np.isfinite(one) == np.isfinite(two)))
        equal &= not np.any(np.abs(values) > _ROUNDING)
        for i, name in enumerate(on.names):
            found = _course(values[:, i], on, tolerance, measure)
            if found is not None and not (probe == "effective_lr" and name in units):
                courses[name][probe] = found
    lost = _lost(a, b, on)
    layers = [Layer(name, courses[name], lost.get(name)) for name in on.names]
    layers.sort(key=lambda layer: (not layer.parted, -layer.size))
    expected = predictions(a, b, on, [layer.name for layer in layers])
    return tuple(
        Layer(one.name, one.courses, one.lost, expected.get(one.name)) for one in layers
    ), equal


def _course(values: Array, on: Aligned, tolerance: float, measure: Measure) -> Course | None:
    return course(
        values,
        on.steps,
        half=on.half,
        tolerance=tolerance,
        scale=measure.scale,
        power=measure.power,
    )


def _lost(a: History, b: History, on: Aligned) -> dict[str, Lost]:
    """Return layers whose norm one run lacks over the last rows, though the other has it."""
    if "norm" not in a.values or "norm" not in b.values or not len(on.steps):
        return {}
    found = {}
    last = max(1, round(_LAST * len(on.steps)))
    for name in on.names:
        there = {
            run: np.isfinite(rows.of(history.of("norm"))[:, history.names.index(name)])
            for run, history, rows in (("a", a, on.a), ("b", b, on.b))
        }
        for run, other in (("a", "b"), ("b", "a")):
            if not there[run][-last:].any() and there[other][-last:].any():
                # After the last number that it has.
                row = len(on.steps) - int(np.argmax(there[run][::-1])) if there[run].any() else 0
                found[name] = Lost(run, int(on.steps[row]))
    return found


def _metrics(a: History, b: History, on: Aligned, tolerance: float) -> tuple[Metric, ...]:
    found = []
    for name in dict.fromkeys((*a.metrics, *b.metrics)):
        one, two = (history.metrics.get(name) for history in (a, b))
        how = None
        if one is not None and two is not None and len(on.steps):
            x, y = on.a.of(one), on.b.of(two)
            both = np.concatenate([x, y])
            both = both[np.isfinite(both)]
            positive = bool(np.all(both > 0))
            scale = None if positive else float(np.median(np.abs(both))) or 1.0
            values = apart(x, y, positive)
            how = course(values, on.steps, half=on.half, tolerance=tolerance, scale=scale)
        found.append(Metric(name, _summary(one), _summary(two), how))
    return tuple(found)


def _summary(values: Array | None) -> tuple[float, float, float] | None:
    there = values[np.isfinite(values)] if values is not None else np.empty(0)
    if not there.size:
        return None
    last = there[-max(1, len(there) // 20) :]
    return float(np.median(last)), float(there.min()), float(there.max())


def _same(found: Diff, equal: bool) -> Same | None:
    """Return in what way the two are the same, None if they are not."""
    a, b = found.a, found.b
    counted = any(change.counts for change in found.changes) or found.only_a or found.only_b
    parted = any(layer.parted for layer in found.layers)
    metrics = any(one.course is not None and one.course.parted for one in found.metrics)
    if counted or parted or metrics or not found.steps[0]:
        return None
    tables = ((a.settings, b.settings), (a.values, b.values), (a.metrics, b.metrics))
    if (
        not found.changes
        and np.array_equal(a.steps, b.steps)
        and all(_equal(one, two) for one, two in tables)
    ):
        return "identical"
    return "rounding" if equal else "tolerance"


def _equal(one: Mapping[str, Array], two: Mapping[str, Array]) -> bool:
    return one.keys() == two.keys() and all(
        np.array_equal(one[key], two[key], equal_nan=True) for key in one
    )


def _notes(a: History, b: History, on: Aligned) -> list[str]:
    notes = [f"{run}: {note}" for run, log in (("a", a), ("b", b)) for note in log.notes]
    notes += [
        f"{run} has no header, so its settings are known only as far as its rows tell"
        for run, log in (("a", a), ("b", b))
        if not log.runs
    ]
    if not len(on.steps):
        notes.append("the logs have no steps in common: dynamics are not compared")
    elif on.interpolated:
        notes.append(
            "hardly any steps were logged in both: the log of more rows was interpolated, linearly "
            "in the logarithm of the step"
        )
    if other_units(a, b, on.names):
        notes.append(
            "effective learning rates are in other units under another optimizer or move, and not "
            "compared there"
        )
    for run, one, two in (("a", a, b), ("b", b, a)):
        if len(on.steps) and one.steps[-1] > two.steps[-1]:
            notes.append(f"{run} goes on to step {one.steps[-1]:,}, which is not compared")
    lacking = [m.probe for m in MEASURES if (m.probe in a.values) != (m.probe in b.values)]
    if lacking:
        notes.append(f"only one log has: {', '.join(lacking)}")
    return notes
