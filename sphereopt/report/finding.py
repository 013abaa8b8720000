"""What a check returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One thing that a log shows.

    Attributes:
        severity: ``"fault"`` (numbers or layers are broken), ``"warning"`` (probably not what was
            wanted), ``"note"`` (good to know) or ``"good"`` (as theory says).
        sentence: What, where, since when, with numbers.
        layers: The layers concerned, the worst first.
        since: First logged step of which it holds, or None if it holds of the whole run.
        chart: Name of the instrument that shows it.
        size: How far it is off, for ranking: natural logarithm of a factor, or a share.
    """

    severity: Literal["fault", "warning", "note", "good"]
    sentence: str
    layers: tuple[str, ...]
    since: int | None
    chart: str
    size: float
