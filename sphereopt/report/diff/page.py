"""One HTML page that shows what changed between two runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sphereopt.report.diff.align import aligned
from sphereopt.report.diff.course import MEASURES, apart
from sphereopt.report.diff.difference import Diff, Layer, diff
from sphereopt.report.diff.drawing import draw_metrics, draw_ratios, draw_two
from sphereopt.report.diff.settings import other_units
from sphereopt.report.diff.text import METRIC_COLUMNS, about, cell, change_rows, metric_rows
from sphereopt.report.drawing import ROWS
from sphereopt.report.instruments import HEAT_MAP, INSTRUMENTS, Log
from sphereopt.report.layers import Cell
from sphereopt.report.svg import to_svg
from sphereopt.report.template import fill, our_script

__all__ = ["render_diff", "write_diff"]

_LINES = {"norm": INSTRUMENTS["norms"], "angle": INSTRUMENTS["angles"], "effective_lr": HEAT_MAP}
_MAPS = ("norm", "angle")
_SHOWN_METRICS = 4
#: Heading, whether it is sorted as a number, and what it is, of the columns beside the measures'.
_AROUND = (
    ("weight", False, "name of the parameter"),
    ("norm expected", True, "what the calculator says that options alone make of the norm"),
    ("angle expected", True, "what the calculator says that options alone make of the angle"),
    ("since", True, "first common step of which something differs"),
)


def render_diff(found: Diff) -> str:
    """Return the page of a difference.

    Args:
        found: What :func:`sphereopt.report.diff` returned.

    Returns:
        An HTML document that refers to nothing outside of itself, in the frame of the report.

    Raises:
        ImportError: If jinja2 or matplotlib is missing; the extra ``report`` brings them.
    """
    columns, layers = _table(found)
    return fill(
        "sphereopt.report.diff",
        "page.html.jinja",
        **our_script(),
        title=" and ".join(Path(log.source).name for log in (found.a, found.b)),
        logs=[(run, log.source, about(log)) for run, log in (("a", found.a), ("b", found.b))],
        found=found,
        charts=list(_charts(found)),
        changes=change_rows(found.changes),
        only=[(run, x) for run, x in (("a", found.only_a), ("b", found.only_b)) if x],
        columns=columns,
        layers=layers,
        metric_columns=METRIC_COLUMNS,
        metrics=metric_rows(found.metrics),
    )


def write_diff(a: Log, b: Log, path: str | Path, *, tolerance: float = 0.1) -> Path:
    """Write the page of the difference of two runs to a file.

    Args:
        a: The run to compare with: a path, rows, or a :class:`~sphereopt.report.History`.
        b: The other one.
        path: The page; its folder is made.
        tolerance: As in :func:`sphereopt.report.diff`.

    Returns:
        The path of the page.

    Raises:
        ValueError: If a log cannot be read.
        OSError: If the page cannot be written.
        ImportError: If jinja2 or matplotlib is missing; the extra ``report`` brings them.
    """
    text = render_diff(diff(a, b, tolerance=tolerance))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _charts(found: Diff) -> Iterator[dict[str, Any]]:
    """Yield the charts: both runs, then metrics, then where they part."""
    on = aligned(found.a, found.b)
    units = other_units(found.a, found.b, on.names)
    for probe, instrument in _LINES.items():
        names = tuple(x for x in on.names if probe != "effective_lr" or x not in units)
        if names and all(_has(log, probe) for log in (found.a, found.b)):
            title = instrument.title.removesuffix(", by layer")
            figure = draw_two(found.a, found.b, names, probe, instrument.unit)
            yield _chart(probe, title, figure, "The median layer, and a band of 80 % of them.")
    both = [name for name in found.a.metrics if name in found.b.metrics]
    for i, name in enumerate(both[:_SHOWN_METRICS]):
        yield _chart(f"metric-{i}", name, draw_metrics(found.a, found.b, name), "As it was logged.")
    for probe in _MAPS if len(on.steps) else ():
        if on.names and all(_has(log, probe) for log in (found.a, found.b)):
            one, two = (
                rows.of(log.of(probe))[:, [log.names.index(name) for name in on.names]]
                for log, rows in ((found.a, on.a), (found.b, on.b))
            )
            logs = apart(one, two, True)
            title = f"{_LINES[probe].title} of b over those of a, by layer"
            what = f"Blue: b's {probe} is smaller; orange: larger; grey: one of them is missing."
            size = -(-len(on.names) // ROWS)
            what += f" Each row is the mean of {size} neighbours." if size > 1 else ""
            figure = draw_ratios(on.steps.astype(float), on.names, logs, probe)
            yield _chart(f"ratio-{probe}", title, figure, what, wide=True)


def _has(log: Any, probe: str) -> bool:
    return probe in log.values and bool(np.isfinite(log.of(probe)).any())


def _chart(name: str, title: str, figure: Any, reading: str, wide: bool = False) -> dict[str, Any]:
    from markupsafe import Markup

    label = f"{title}: a and b against steps" if not wide else title
    svg = Markup(to_svg(figure, name.replace("_", "-"), label))
    return {"name": name.replace("_", "-"), "title": title, "reading": reading, "wide": wide} | {
        "svg": svg
    }


def _table(found: Diff) -> tuple[list[tuple[str, bool, str]], list[list[Cell]]]:
    """Return headings and rows of the table of layers, without columns that are empty."""
    name, *expected, since = _AROUND
    measures = [(m.heading, True, f"{m.words}, b to a, second half") for m in MEASURES]
    columns = [name, *measures, *expected, since]
    rows = [_row(layer) for layer in found.layers]
    shown = [i for i in range(len(columns)) if i == 0 or any(row[i].text != "–" for row in rows)]
    return [columns[i] for i in shown], [[row[i] for i in shown] for row in rows]


def _row(layer: Layer) -> list[Cell]:
    cells = []
    for measure in MEASURES:
        course = layer.courses.get(measure.probe)
        if course is None or course.late is None:
            cells.append(Cell("–"))
        else:
            cells.append(Cell(cell(course) + " *" * course.parted, course.late))
    expected = layer.predicted
    for value in (None, None) if expected is None else (expected.norm, expected.angle):
        text = "–" if value is None else f"{value:.2f}x"
        cells.append(Cell(text, math.nan if value is None else value))
    since = layer.since
    cells.append(Cell("–" if since is None else f"{since:,}", math.nan if since is None else since))
    return [Cell(layer.name), *cells]
