"""Matplotlib figures as SVG text that can stand in an HTML page, beside others."""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "GRID", "INK", "to_svg"]

#: Colours that :func:`to_svg` turns into what the page's style sheet says, light or dark.
INK, GRID = "#1b1f25", "#d5dae1"
#: Okabe and Ito's colours that all readers can tell apart, one per arm.
COLOURS = {"sgd": "#0072b2", "free": "#e69f00", "fixed": "#009e73"}
_STYLE = {INK: "currentColor", GRID: "var(--grid)"} | {
    colour: f"var(--{arm})" for arm, colour in COLOURS.items()
}


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an ``<svg>`` element for an HTML page.

    Args:
        figure: A matplotlib figure; colours of this module become style variables of the page.
        name: Distinct for each figure of a page: all ids start with it.
        label: What the figure shows, for readers who cannot see it.

    Returns:
        The element, scaling to the width it is given, with text as text, a transparent ground,
        and nothing that refers outside of it.

    Notes:
        matplotlib numbers ids from 1 in every figure and writes a style rule for all elements;
        both would leak into the rest of a page.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with (
        mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}),
        warnings.catch_warnings(),
    ):
        # The reader's browser draws the text, and has more glyphs than matplotlib's font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    # A hundredth of a point is less than a screen shows, and half of the page's size.
    text = re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    for colour, style in _STYLE.items():
        text = text.replace(colour, style)
    head, _, rest = text.partition(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(label)}">{rest}'.strip()
