"""Titled tables as aligned text."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Row", "Section"]

Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A titled table; ``str`` of it is aligned text.

    Attributes:
        title: What it answers.
        rows: Its rows; all of one length.
        header: Names of the columns; empty for rows that name themselves.
    """

    title: str
    rows: tuple[Row, ...]
    header: Row = ()

    def __str__(self) -> str:
        every = [row for row in (self.header, *self.rows) if row]
        widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))]
        lines = []
        for row in every:
            # Columns of numbers end together, names and explanations begin together.
            cells = [
                cell.rjust(width) if self.header else cell.ljust(width)
                for cell, width in zip(row, widths, strict=True)
            ]
            lines.append(f"  {'  '.join(cells)}".rstrip())
        return "\n".join([self.title, *lines])
