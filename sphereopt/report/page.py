"""One HTML page that shows a run, in one file, without a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sphereopt.report.data import curves_csv, data_link, layers_csv
from sphereopt.report.drawing import LAYERS, ROWS
from sphereopt.report.findings import Finding, findings, verdict
from sphereopt.report.history import History, as_history
from sphereopt.report.instruments import HEAT_MAP, INSTRUMENTS, Instrument, Log, draw, has, metric
from sphereopt.report.layers import COLUMNS, filled_columns, layer_rows
from sphereopt.report.rates import steady_words
from sphereopt.report.series import middle
from sphereopt.report.settings import groups_table, missing, runs_list
from sphereopt.report.svg import to_svg
from sphereopt.report.template import fill, our_script
from sphereopt.report.words import number

__all__ = ["render", "write"]

#: Charts that come first; the others follow the table.
_FIRST = ("norms", "angles", "grad-radial-share", "radial-share")
_SHOWN_METRICS = 6


def render(log: Log) -> str:
    """Return the page of a run.

    Args:
        log: Path of a JSONL file, rows, or a :class:`~sphereopt.report.History`.

    Returns:
        An HTML document that refers to nothing outside of itself; light or dark as the reader has
        it, printable, and readable on a phone. Its script sorts the table and marks lines; a
        security policy lets no other script run and no request leave.

    Raises:
        ValueError: If the log cannot be read, or has no row.
        OSError: If the file is missing.
        ImportError: If jinja2 or matplotlib is missing; the extra ``report`` brings them.
    """
    history = as_history(log)
    if not len(history.steps) or not history.names:
        raise ValueError(f"{history.source}: no parameter was logged, so there is nothing to show")
    found = findings(history)
    layers = layer_rows(history)
    shown = filled_columns(layers)
    first, more = _charts(history, found)
    drawn = {chart["name"] for chart in (*first, *more)}
    return fill(
        "sphereopt.report",
        "run.html.jinja",
        **our_script(),
        title=Path(history.source).name,
        history=history,
        verdict=verdict(history, found),
        worst=found[0].severity if found else "good",
        findings=[(finding, finding.chart in drawn) for finding in found],
        first=first,
        more=more,
        apart=len(history.names) <= LAYERS,
        columns=[COLUMNS[i] for i in shown],
        layers=[[row[i] for i in shown] for row in layers],
        steady=steady_words(history),
        runs=runs_list(history),
        groups=groups_table(history),
        missing=missing(history),
        downloads=[
            ("layers.csv", "the table", data_link(layers_csv(layers))),
            ("curves.csv", "the curves", data_link(curves_csv(history))),
        ],
    )


def write(log: Log, path: str | Path) -> Path:
    """Write the page of a run to a file.

    Args:
        log: Path of a JSONL file, rows, or a :class:`~sphereopt.report.History`.
        path: The page; its folder is made.

    Returns:
        The path of the page.

    Raises:
        ValueError: If the log cannot be read, or has no row.
        OSError: If the log is missing, or the page cannot be written.
        ImportError: If jinja2 or matplotlib is missing; the extra ``report`` brings them.
    """
    text = render(log)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _charts(
    history: History, found: Sequence[Finding]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the charts above the table and those below it."""
    there = [one for one in INSTRUMENTS.values() if has(history, one)]
    first = [_chart(history, one, found) for one in there if one.name in _FIRST]
    if has(history, HEAT_MAP):
        first.insert(min(2, len(first)), _chart(history, HEAT_MAP, ()))
    more = [_chart(history, one, found) for one in there if one.name not in _FIRST]
    return first, [*_metrics(history), *more]


def _chart(history: History, one: Instrument, found: Sequence[Finding]) -> dict[str, Any]:
    """Return a chart, in which the layers that findings speak of stand out."""
    from markupsafe import Markup

    alarming = [x for x in found if x.chart == one.name and x.severity in ("fault", "warning")]
    figure = draw(history, one, list(dict.fromkeys(x.layers[0] for x in alarming)))
    groups = -(-len(history.names) // ROWS) if one is HEAT_MAP else 1
    grouped = f" Each row is the mean of {groups} neighbours." if groups > 1 else ""
    return {
        "name": one.name,
        "title": one.title,
        "reading": one.reading + grouped,
        "wide": one is HEAT_MAP,
        "svg": Markup(to_svg(figure, one.name, _label(history, one))),
    }


def _label(history: History, one: Instrument) -> str:
    """Return a chart in words, for readers who cannot see it."""
    rows = np.flatnonzero(np.isfinite(history.of(one.probe)).any(1))
    ends = [
        f"{number(middle(history.of(one.probe)[row]))} at step {history.steps[row]:,}"
        for row in (rows[0], rows[-1])
    ]
    return f"{one.title}: the median layer goes from {ends[0]} to {ends[1]}."


def _metrics(history: History) -> Iterator[dict[str, Any]]:
    from markupsafe import Markup

    for i, name in enumerate(list(history.metrics)[:_SHOWN_METRICS]):
        if np.isfinite(history.metrics[name]).any():
            chart = f"metric-{i}"
            yield {
                "name": chart,
                "title": name,
                "reading": "As it was given to the tracker, averaged over stretches of the run.",
                "wide": False,
                "svg": Markup(to_svg(metric(history, name), chart, f"{name} against steps")),
            }
