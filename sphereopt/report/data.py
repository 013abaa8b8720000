"""What the page shows, as files that it carries within itself."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence

import numpy as np

from sphereopt.report.history import History
from sphereopt.report.layers import COLUMNS, Cell
from sphereopt.report.series import Array, averaged, parts, quantiles

__all__ = ["curves_csv", "data_link", "layers_csv"]

_POINTS = 500
#: A page stays small enough to be mailed.
_LIMIT = 1_000_000


def layers_csv(rows: Sequence[Sequence[Cell]]) -> str:
    """Return the table of the layers as CSV, numbers in full."""
    lines = [[name for name, *_ in COLUMNS]]
    lines += [[cell.key or cell.text.replace("–", "") for cell in row] for row in rows]
    return _csv(lines)


def curves_csv(history: History) -> str:
    """Return what the charts show as CSV: the median layer, and the band, at each step drawn."""
    starts = parts(len(history.steps), _POINTS)
    steps = averaged(history.steps.astype(float), starts)
    header, columns = ["step"], [steps]
    for probe in history.values:
        low, middle, high = quantiles(averaged(history.of(probe), starts), (0.1, 0.5, 0.9))
        header += [f"{probe} median layer", f"{probe} 10 %", f"{probe} 90 %"]
        columns += [middle, low, high]
    for name, values in history.metrics.items():
        header.append(name)
        columns.append(averaged(np.asarray(values, float), starts))
    return _csv([header, *([_number(x) for x in row] for row in zip(*columns, strict=True))])


def _number(value: float | Array) -> str:
    return "" if np.isnan(value) else f"{value:.7g}"


def _csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def data_link(text: str) -> str:
    """Return an address that holds a text within itself, empty if that would be too large."""
    if len(text) > _LIMIT:
        return ""
    return "data:text/csv;base64," + base64.b64encode(text.encode()).decode()
