"""Rows of text in columns, and numbers in them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["Result", "columns", "number"]


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for a column, ``-`` for none.

    Example:
        >>> number(0.12345), number(None), number(float("inf"))
        ('0.123', '-', 'inf')
    """
    return "-" if value is None else f"{value:.{digits}g}"


def columns(rows: Sequence[Sequence[str]], names: int) -> list[str]:
    """Return rows as lines: the first ``names`` columns begin together, numbers end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


class Result:
    """What measurements have in common: dataclasses that become dicts and JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Return all values as nested dicts and lists; None for NaN and infinity."""
        values: dict[str, Any] = _plain(self)
        return values

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def _plain(value: Any) -> Any:
    """Return dataclasses as dicts and tuples as lists; None for what JSON has no number for."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
