"""Records as aligned text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["table"]


def table(
    title: str, facts: Mapping[str, tuple[float | None, str]], warnings: Sequence[str] = ()
) -> str:
    """Return a title and aligned rows of name, value and text, without what is unknown."""
    known = {name: (f"{x:.4g}", text) for name, (x, text) in facts.items() if x is not None}
    width = max(map(len, known))
    lines = [f"  {name:<{width}}  {x:<10}  {text}".rstrip() for name, (x, text) in known.items()]
    return "\n".join([title, *lines, *(f"  warning: {text}" for text in warnings)])
