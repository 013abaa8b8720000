"""The table of the layers: where each began, where it is, and what was expected."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sphereopt.report.history import History
from sphereopt.report.rates import norm_ratio, steady
from sphereopt.report.series import Array, middle
from sphereopt.report.words import number, percent, plain

__all__ = ["COLUMNS", "Cell", "filled_columns", "layer_rows"]

#: Heading, whether it is sorted as numbers, and what it is.
COLUMNS = (
    ("weight", False, "name of the parameter"),
    ("sphere", False, "what of it is a sphere"),
    ("kind", False, "proved to be scale-invariant, or constrained by choice"),
    ("count", True, "spheres"),
    ("first norm", True, "median over its spheres, at its first logged step"),
    ("last norm", True, "median over its spheres, at its last logged step"),
    ("angle", True, "rad per step, median over the steady part"),
    ("expected", True, "rad per step at equilibrium, median over the steady part"),
    ("ratio", True, "angle over expected"),
    ("effective lr", True, "median over the steady part"),
    ("|cos(g, w)|", True, "median over the steady part"),
    (
        "norm against equilibrium",
        True,
        "median over the last fifth of that; settled within 20 %",
    ),
)
#: As in theory.at_equilibrium: what theory and networks differ by, doubled.
_SETTLED = 0.2


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number it is sorted by, NaN if it has none."""

    text: str
    value: float = math.nan

    @property
    def key(self) -> str:
        """The number for the page's script, empty if there is none."""
        return "" if math.isnan(self.value) else repr(self.value)


def layer_rows(history: History) -> list[list[Cell]]:
    """Return one row per layer, with the cells of ``COLUMNS``.

    Args:
        history: The log.

    Returns:
        Rows in the order of the log.
    """
    wanted = ("norm", "angle", "equilibrium_angle", "effective_lr", "grad_radial_share")
    there = {probe: history.of(probe) for probe in wanted if probe in history.values}
    against = _against_equilibrium(history)
    return [_row(history, i, there, against[i]) for i in range(len(history.names))]


def filled_columns(rows: list[list[Cell]]) -> list[int]:
    """Return the columns in which some layer has something."""
    return [i for i in range(len(COLUMNS)) if any(row[i].text != "–" for row in rows)]


def _row(history: History, i: int, there: dict[str, Array], against: float) -> list[Cell]:
    about = history.about[history.names[i]]
    late = steady(history)
    first, last = _ends(there["norm"][:, i]) if "norm" in there else (math.nan, math.nan)
    angle, expected, rate, cosine = (
        middle(np.abs(there[probe][late, i])) if probe in there else math.nan
        for probe in ("angle", "equilibrium_angle", "effective_lr", "grad_radial_share")
    )
    ratio = angle / expected if expected > 0 else math.nan
    count = about.get("count")
    return [
        Cell(history.names[i]),
        Cell(plain(about.get("sphere"))),
        Cell(plain(about.get("kind"))),
        Cell("–" if count is None else f"{count:,}", math.nan if count is None else float(count)),
        *(_cell(x) for x in (first, last, angle, expected)),
        Cell("–" if math.isnan(ratio) else f"{ratio:.2f}", ratio),
        *(_cell(x) for x in (rate, cosine)),
        _settled(against),
    ]


def _cell(value: float) -> Cell:
    # Trailing zeros kept: the digits of a column stand below each other.
    text = number(value) if abs(value) < 1e-3 else f"{value:#.3g}".rstrip(".")
    return Cell("–" if math.isnan(value) else text, value)


def _settled(against: float) -> Cell:
    if math.isnan(against):
        return Cell("–")
    side = "above" if against > 0 else "below"
    text = "settled" if abs(against) <= _SETTLED else f"{percent(abs(against))} {side}"
    return Cell(text, against)


def _ends(values: Array) -> tuple[float, float]:
    found = values[np.isfinite(values)]
    return (float(found[0]), float(found[-1])) if found.size else (math.nan, math.nan)


def _against_equilibrium(history: History) -> list[float]:
    """Return the norm over that at equilibrium, less one, at the end of the steady part."""
    if "equilibrium_norm" not in history.values or "norm" not in history.values:
        return [math.nan] * len(history.names)
    rows = steady(history)[-max(1, len(steady(history)) // 5) :]
    ratio = norm_ratio(history)[rows] - 1
    return [middle(ratio[:, i]) for i in range(ratio.shape[1])]
