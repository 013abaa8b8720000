"""Records as aligned text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["table"]


def table(
    title: str,
    rows: Iterable[tuple[str, float | str | None, str]],
    warnings: Sequence[str] = (),
) -> str:
    """Return a title and aligned rows of name, value, unit; rows without a value are left out."""
    known = [
        (name, value if isinstance(value, str) else f"{value:.4g}", unit)
        for name, value, unit in rows
        if value is not None
    ]
    width = max(len(name) for name, _, _ in known)
    lines = [f"  {name:<{width}}  {value:<10}  {unit}".rstrip() for name, value, unit in known]
    return "\n".join([title, *lines, *(f"  warning: {text}" for text in warnings)])
