"""A difference as text of at most 100 columns, and as plain values."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sphereopt.monitor.jsonl import finite
from sphereopt.report.diff.course import MEASURES, Course
from sphereopt.report.diff.settings import Change
from sphereopt.report.diff.verdict import shown_value, times
from sphereopt.report.words import number, percent

if TYPE_CHECKING:
    from sphereopt.report.diff.difference import Diff, Layer, Metric

__all__ = [
    "COLUMNS",
    "METRIC_COLUMNS",
    "about",
    "as_json",
    "as_text",
    "cell",
    "change_rows",
    "metric_rows",
]

#: Layers shown unless all are asked for.
_TOP = 10
_WIDTH, _NAME, _VALUE = 100, 26, 20
#: Measures that have a column; the JSON has all.
COLUMNS = MEASURES[:5]


def as_json(found: Diff) -> dict[str, Any]:
    """Return a difference as plain values.

    Args:
        found: The difference.

    Returns:
        ``format`` 1, ``a`` and ``b`` (source, logged rows, steps), ``same``, ``differs``,
        ``verdict``, and the fields of :class:`~sphereopt.report.Diff`; a number that is
        not finite is None.
    """
    keys = ("tolerance", "same", "differs", "verdict", "only_a", "only_b", "notes")
    count, first, last = found.steps
    layers = [_layer_json(one) for one in found.layers]
    plain = {
        "format": 1,
        **{run: _log_json(log) for run, log in (("a", found.a), ("b", found.b))},
        **{key: _plain(getattr(found, key)) for key in keys},
        "steps": {"count": count, "first": first, "last": last},
        "changes": [_plain(asdict(one)) for one in found.changes],
        "layers": layers,
        "metrics": [_plain(asdict(one)) for one in found.metrics],
    }
    values: dict[str, Any] = finite(plain)
    return values


def _log_json(log: Any) -> dict[str, Any]:
    first, last = int(log.steps[0]), int(log.steps[-1])
    return {"source": log.source, "logged": log.logged, "first": first, "last": last}


def _layer_json(layer: Layer) -> dict[str, Any]:
    values: dict[str, Any] = _plain(asdict(layer))
    return values | {"parted": layer.parted, "since": layer.since}


def _plain(value: Any) -> Any:
    """Return a value as it comes back from JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(x) for x in value] if isinstance(value, tuple | list) else value


def as_text(found: Diff, *, every: bool = False) -> str:
    """Return a difference as aligned tables, the most important first.

    Args:
        found: The difference.
        every: All layers instead of the ten that are farthest apart.

    Returns:
        Lines of at most 100 columns, as long as names of metrics are short.
    """
    parts = [
        "\n".join(_log_line(run, log) for run, log in (("a", found.a), ("b", found.b))),
        "\n".join(textwrap.fill(sentence, _WIDTH) for sentence in found.verdict),
        _table("Settings", ("", "a", "b", "where"), change_rows(found.changes, short=True)),
        *_only(found),
        *_layers(found, every),
        _metrics(found),
        "\n".join(textwrap.fill(f"Note: {note}.", _WIDTH) for note in found.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def _log_line(run: str, log: Any) -> str:
    return f"{run}  {_end(log.source, 40)}: {about(log)}"


def about(log: Any) -> str:
    """Return what a log is: optimizers, layers, logged steps."""
    names = dict.fromkeys(str(run["optimizer"]) for run in log.runs if run.get("optimizer"))
    layers = f"{len(log.names):,} layer{'s' * (len(log.names) != 1)}"
    steps = f"{log.logged:,} logged step{'s' * (log.logged != 1)}"
    span = f"{log.steps[0]:,} to {log.steps[-1]:,}"
    return ", ".join([*list(names)[:2], layers, f"{steps}, {span}"])


def change_rows(changes: Sequence[Change], short: bool = False) -> list[tuple[str, ...]]:
    """Return name, values and place of each change.

    Args:
        changes: What was set otherwise.
        short: Values and names cut to what fits a line.
    """
    rows = []
    for one in changes:
        values = [shown_value(value) for value in (one.a, one.b)]
        names = [_end(name, _NAME) if short else name for name in one.names]
        if short:
            values = [x if len(x) <= _VALUE else x[: _VALUE - 1] + "…" for x in values]
        where = names[0] + (f" and {len(names) - 1} more" if names[1:] else "") if names else "run"
        rows.append((one.what.replace("_", " "), *values, where + _when(one)))
    return rows


def _when(change: Change) -> str:
    since = "" if change.since is None else f", from step {change.since:,}"
    return since + ("" if change.until is None else f", until step {change.until:,}")


def _only(found: Diff) -> Iterator[str]:
    for run, names in (("a", found.only_a), ("b", found.only_b)):
        if names:
            shown = ", ".join(_end(name, _NAME) for name in names[:8])
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            yield textwrap.fill(f"Tracked only in {run}: {shown}{more}", _WIDTH)


def _layers(found: Diff, every: bool) -> Iterator[str]:
    if not found.steps[0] or not (every or any(layer.parted for layer in found.layers)):
        return
    shown = found.layers if every else found.layers[:_TOP]
    used = [m for m in COLUMNS if any(m.probe in layer.courses for layer in shown)]
    header = ("", *(m.heading for m in used), "since", "farthest")
    rows = [
        (
            layer.name,
            *(cell(layer.courses.get(m.probe), found) for m in used),
            "" if layer.since is None else f"{layer.since:,}",
            _farthest(layer),
        )
        for layer in shown
    ]
    count, first, last = found.steps
    title = (
        f"Dynamics, second half of {count:,} common steps ({first:,} to {last:,}): b/a, cosines "
        f"b - a; = within {percent(found.tolerance)} or noise"
    )
    more = len(found.layers) - len(shown)
    yield "\n".join(
        [
            textwrap.fill(title, _WIDTH),
            _table("", header, _fitted(header, rows)),
            *([f"  and {more:,} more layers; --all shows them"] if more else []),
        ]
    )


def _fitted(header: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return rows whose names, at the start, are cut to what the other columns leave of a line."""
    others = (max(len(row[i]) for row in (header, *rows)) for i in range(1, len(header)))
    room = _WIDTH - 2 - sum(2 + width for width in others)
    return [(_end(name, max(12, room)), *cells) for name, *cells in rows]


def cell(course: Course | None, found: Diff | None = None) -> str:
    """Return how b stands to a over the second half, ``=`` if that is within the tolerance."""
    if course is None or course.late is None:
        return "–"
    if found is not None and not course.parted:
        return "="
    return times(course.late) if course.is_ratio else f"{course.late:+.2g}"


def _farthest(layer: Layer) -> str:
    """Return where the run is farthest apart: quantity, by how much, and step."""
    if layer.lost is not None:
        return f"{layer.lost.run} has no numbers"
    parted = [(m, course) for m in MEASURES if (course := layer.courses.get(m.probe))]
    parted = [pair for pair in parted if pair[1].parted]
    if not parted:
        return ""
    measure, course = max(parted, key=lambda pair: pair[1].size)
    figure = times(course.largest) if course.is_ratio else f"{course.largest:+.2g}"
    return f"{measure.heading} {figure} at {course.largest_at:,}"


METRIC_COLUMNS = ("", "b/a", "a last", "b last", "a low", "b low", "a high", "b high", "since")


def _metrics(found: Diff) -> str:
    rows = metric_rows(found.metrics)
    return _table("Metrics", METRIC_COLUMNS, _fitted(METRIC_COLUMNS, rows)) if rows else ""


def metric_rows(metrics: Sequence[Metric]) -> list[tuple[str, ...]]:
    """Return name, ratio, last and lowest values, and since when, of each metric."""
    rows = []
    for one in metrics:
        ends = [
            "–" if summary is None else number(summary[i])
            for i in (0, 1, 2)
            for summary in (one.a, one.b)
        ]
        since = one.course.since if one.course is not None and one.course.parted else None
        how = "=" if one.course is not None and not one.course.parted else cell(one.course)
        rows.append((one.name, how, *ends, "" if since is None else f"{since:,}"))
    return rows


def _table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows in aligned columns; names and places begin together, numbers end together."""
    if not rows:
        return ""
    every = [header, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    right = {i for i in range(1, len(header)) if header[i] not in ("where", "farthest")}
    lines = [title] if title else []
    for row in every:
        cells = [
            text.rjust(width) if i in right else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def _end(name: str, width: int) -> str:
    """Return the end of a long name, which tells layers apart."""
    return name if len(name) <= width else "…" + name[1 - width :]
