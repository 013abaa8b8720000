"""Numbers and lists of names as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["factor", "listed", "number", "percent", "plain"]


def number(value: float) -> str:
    """Return a number with three digits, small and large ones in powers of ten.

    Example:
        >>> number(0.0187312), number(2.51e-12), number(0.0)
        ('0.0187', '2.5e-12', '0')
    """
    if value == 0:
        return "0"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def factor(value: float) -> str:
    """Return a ratio in words.

    Example:
        >>> factor(9.04), factor(2.41), factor(math.inf), factor(12_345.6)
        ('9.0x', '2.4x', 'infinitely', '12,346x')
    """
    if math.isinf(value):
        return "infinitely"
    return f"{value:.1f}x" if value < 100 else f"{value:,.0f}x"


def percent(share: float) -> str:
    """Return a share in percent, without digits that mean nothing.

    Example:
        >>> percent(0.3219), percent(0.0123), percent(-0.5)
        ('32 %', '1.2 %', '-50 %')
    """
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.2g} %"


def listed(names: Sequence[str]) -> str:
    """Return the first name and how many more there are.

    Example:
        >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
        ('a', 'a and 1 other layer', 'a and 2 other layers')
    """
    more = len(names) - 1
    return names[0] + (f" and {more} other layer{'s' * (more > 1)}" if more else "")


def plain(value: object) -> str:
    """Return a setting as a table shows it, a dash for none.

    Example:
        >>> plain(None), plain([0.9, 0.95]), plain("row")
        ('–', '0.9, 0.95', 'row')
    """
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
