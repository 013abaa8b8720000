"""Two runs in one to three sentences, with a cause where the calculator supports one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sphereopt.report.diff.align import Aligned
from sphereopt.report.diff.cause import CAUSES
from sphereopt.report.diff.course import MEASURES, Measure
from sphereopt.report.diff.settings import Change, members
from sphereopt.report.words import listed, percent

if TYPE_CHECKING:
    from sphereopt.report.diff.difference import Diff, Layer, Metric

__all__ = ["shown_value", "times", "verdict"]

#: A cause is named if options alone make of norms or angles what was measured within this: what
#: theory and networks differ by, doubled, as in theory.at_equilibrium.
_AGREES = 0.2
_SAID = MEASURES[:4]
_RADIAL = "grad_radial_share"
#: Ratios of layers further apart than this are said as a range.
_ALIKE = 2.0


def times(ratio: float) -> str:
    """Return a ratio with two digits.

    Example:
        >>> times(2.149), times(0.4), times(0.98), times(1234.5), times(1e9)
        ('2.1x', '0.40x', '0.98x', '1,234x', 'infinitely')
    """
    if ratio >= 1e8 or ratio <= 1e-8:
        return "infinitely" if ratio > 1 else "0x"
    if ratio >= 100:
        return f"{ratio:,.0f}x"
    if 0.1 <= ratio < 1.1:
        return f"{ratio:.2f}x"
    return f"{float(f'{ratio:.2g}'):g}x"


def shown_value(value: Any) -> str:
    """Return a value of an option.

    Example:
        >>> shown_value(None), shown_value([0.9, 0.999]), shown_value(0.10000000000000002)
        ('–', '0.9, 0.999', '0.1')
    """
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{shown_value(x)} from {key}" for key, x in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(shown_value, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def verdict(found: Diff, on: Aligned) -> Iterator[str]:
    """Yield what a researcher would say of a difference, the most important first.

    Args:
        found: All but the verdict.
        on: The common steps.
    """
    if not on.steps.size:
        yield "The two logs have no steps in common, so only settings and names are compared."
        return
    gone = [layer for layer in found.layers if layer.lost is not None]
    parted = [layer for layer in found.layers if layer.parted]
    if not parted:
        yield _no_layer(found)
    else:
        yield from _lost(gone)
        yield from _dynamics(found, parted)
        yield from _radial(parted)
        yield from _first(parted, int(on.steps[0]))
    metrics = [one for one in found.metrics if one.course is not None and one.course.parted]
    if metrics and not gone:
        yield _metric(metrics)


def _no_layer(found: Diff) -> str:
    if found.same == "identical":
        return "The two logs are identical."
    if found.same == "rounding":
        return "The two runs are the same to rounding: all medians agree within 0.001 %."
    within = f"no layer differs by more than {percent(found.tolerance)} beyond noise"
    if not found.layers:
        return "The two logs have no parameter in common."
    counted = [change for change in found.changes if change.counts]
    if counted:
        return f"Settings differ ({_some(counted)}), but {within}."
    if found.only_a or found.only_b:
        return f"Some parameters are tracked in one run only; of the others {within}."
    return f"The two runs agree: {within}."


def _lost(gone: Sequence[Layer]) -> Iterator[str]:
    if gone:
        first = min(gone, key=lambda layer: layer.lost.step if layer.lost else 0)
        assert first.lost is not None
        names = [first.name, *(layer.name for layer in gone if layer is not first)]
        run, step = first.lost.run, first.lost.step
        yield f"{run} has no numbers of {listed(names)} from step {step:,} on."


def _dynamics(found: Diff, parted: Sequence[Layer]) -> Iterator[str]:
    """Yield what differs by how much, and why if that is known."""
    said = [x for x in (_measure(found, parted, m) for m in _SAID) if x is not None]
    if not said:
        # Those of the other layers are said of in their own sentence.
        mine = [x for x in parted if not _parted(x, _RADIAL)]
        words = [m.words for m in MEASURES if any(_parted(x, m.probe) for x in mine)]
        if words:
            yield f"The runs differ in {_listed(words)}, in {listed([x.name for x in mine])}."
        return
    first, *others = said
    places = {where for *_, where in said}
    once = places.pop() if len(places) == 1 else ""
    items = [f"{first[0]} are {first[1]}{_possessive(first[0])}{'' if once else first[2]}"]
    items += [f"{words} {figures}{'' if once else where}" for words, figures, where in others]
    where = f",{once}," if once else ""
    yield f"Over the second half{where} b's {_listed(items)}{_cause(found, parted)}"


def _radial(parted: Sequence[Layer]) -> Iterator[str]:
    """Yield which layers are scale-invariant in one run and not in the other."""
    courses = [(x.courses[_RADIAL], x.name) for x in parted if _parted(x, _RADIAL)]
    away = [(course.late or course.end, name) for course, name in courses]
    if away:
        away.sort(key=lambda pair: -abs(pair[0]))
        names = listed([name for _, name in away])
        yield f"The cosine of gradient and weights differs by {away[0][0]:+.2g} in {names}."


def _possessive(words: str) -> str:
    return " a's" if words == MEASURES[0].words else ""


def _parted(layer: Layer, probe: str) -> bool:
    return probe in layer.courses and layer.courses[probe].parted


def _measure(found: Diff, parted: Sequence[Layer], measure: Measure) -> tuple[str, str, str] | None:
    """Return a quantity, its typical ratio where it differs, and in how many layers it does."""
    count = len(found.layers)
    late = [
        late
        for layer in parted
        if _parted(layer, measure.probe) and (late := layer.courses[measure.probe].late) is not None
        if abs(math.log(late)) > math.log1p(found.tolerance)
    ]
    if not late:
        return None
    figure = times(math.exp(float(np.median(np.log(late)))))
    if min(late) < 1 < max(late) or max(late) > _ALIKE * min(late):
        figure = f"between {times(min(late))} and {times(max(late))}"
    where = f" in {len(late)} of {count} layers" if len(late) < count else ""
    return measure.words, figure, where


def _cause(found: Diff, parted: Sequence[Layer]) -> str:
    """Return the end of the sentence: why, what the calculator says, or that nothing says why."""
    names = {member for layer in parted for member in members(layer.name)}
    mine = [x for x in found.changes if x.what in CAUSES and names & _members(x)]
    if not mine:
        if not found.a.runs or not found.b.runs:
            return "; no header says why."
        return (
            "; no option of an optimizer differs, so look at data, seeds, initial weights and code."
        )
    options = _some(sorted(mine, key=lambda x: CAUSES.index(x.what)))
    judged = [x for x in parted if x.predicted is not None]
    for probe in ("norm", "angle"):
        pairs = [(p, late) for x in judged if (p := _of(x, probe)) and (late := _late(x, probe))]
        if not pairs:
            continue
        expected, measured = (
            math.exp(float(np.median(np.log(x)))) for x in zip(*pairs, strict=True)
        )
        if abs(math.log(measured)) <= math.log1p(found.tolerance):
            continue
        figures = f"{times(expected)} of {probe}s, measured {times(measured)}"
        if abs(math.log(expected / measured)) <= math.log1p(_AGREES):
            return f", because of {options}: by the calculator that alone makes {figures}."
        return (
            f". Set otherwise: {options}; by the calculator that makes {figures}, so it is not all."
        )
    return f". Set otherwise: {options}."


def _members(change: Change) -> set[str]:
    return {member for name in change.names for member in members(name)}


def _of(layer: Layer, probe: str) -> float | None:
    return getattr(layer.predicted, probe) if layer.predicted is not None else None


def _late(layer: Layer, probe: str) -> float | None:
    return layer.courses[probe].late if probe in layer.courses else None


def _change(change: Change) -> str:
    what = change.what.replace("_", " ")
    when = "" if change.since is None else f" from step {change.since:,} on"
    return f"{what} {shown_value(change.a)} → {shown_value(change.b)}{when}"


def _some(changes: Sequence[Change]) -> str:
    said = [_change(one) for one in changes[:3]]
    return _listed(said + ([f"{len(changes) - 3} more"] if len(changes) > 3 else []))


def _metric(metrics: Sequence[Metric]) -> str:
    one, more = metrics[0], len(metrics) - 1
    also = f" (and {more} more metric{'s differ' if more > 1 else ' differs'})" if more else ""
    if one.course is None or one.course.late is None or not one.course.is_ratio:
        return f"{one.name} differs{also}."
    return f"b's {one.name} is {times(one.course.late)} a's{also}."


def _first(parted: Sequence[Layer], start: int) -> Iterator[str]:
    """Yield where and when they part first."""
    dated = [(x.since, -x.size, x) for x in parted if x.since is not None]
    if not dated:
        return
    since, _, layer = min(dated, key=lambda x: x[:2])
    if since == start:
        yield f"They are apart from the first common step, {start:,}, on."
        return
    first = [m.words for m in MEASURES if _since(layer, m.probe) == since]
    what = f" ({_listed(first[:2])})" if first else ""
    yield f"They part first at step {since:,}, in {layer.name}{what}."


def _since(layer: Layer, probe: str) -> int | None:
    return layer.courses[probe].since if probe in layer.courses else None


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
