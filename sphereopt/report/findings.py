"""A run in sentences: what went wrong, what stands out, and what went as theory says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from sphereopt.report.checks import broken, direction, settling
from sphereopt.report.finding import Finding
from sphereopt.report.history import History, as_history
from sphereopt.report.instruments import Log

__all__ = ["CHECKS", "Finding", "findings", "verdict"]

#: Every check, a function from a History to findings. Order does not matter.
CHECKS: tuple[Callable[[History], Iterable[Finding]], ...] = (
    broken.not_finite,
    broken.stopped,
    broken.partly_stopped,
    broken.no_gradient,
    broken.left,
    direction.radial_gradients,
    direction.uneven_angles,
    direction.effective_rates,
    settling.drift_when_fixed,
    settling.equilibrium,
    settling.predicted_angles,
    settling.lost_growth,
)
_ORDER = ("fault", "warning", "note", "good")


def findings(log: Log) -> list[Finding]:
    """Return what a log shows, the most important first.

    Args:
        log: Path of a JSONL file, rows, or a :class:`~sphereopt.report.History`.

    Returns:
        Findings, faults before warnings before notes before what went as expected, and the larger
        deviation first among those.

    Raises:
        ValueError: If the log cannot be read.

    Notes:
        One finding per kind, about the worst layer, with the others counted: a fault in all layers
        is one fault. Each check's threshold and its reason stand where it is defined.

    Example:
        >>> table = dict.fromkeys(("mean", "min", "q25", "median", "q75", "max"))
        >>> entry = {"sphere": "row", "lr": 0.1, "count": 3, "norm": table}
        >>> print(findings([{"step": 7, "parameters": {"conv.weight": entry}}])[0].sentence)
        The norm of conv.weight is not a number since step 7.
    """
    history = as_history(log)
    found = [finding for check in CHECKS for finding in check(history)]
    return sorted(found, key=lambda x: (_ORDER.index(x.severity), -_size(x)))


def _size(finding: Finding) -> float:
    return -math.inf if math.isnan(finding.size) else finding.size


def verdict(history: History, found: Sequence[Finding]) -> str:
    """Return the run in one sentence.

    Args:
        history: The log.
        found: Its findings.

    Returns:
        What matters most: faults, else warnings, else that nothing stands out.
    """
    faults, warnings = (sum(x.severity == kind for x in found) for kind in ("fault", "warning"))
    layers = f"{len(history.names):,} layer{'s' * (len(history.names) != 1)}"
    span = f"steps {history.steps[0]:,} to {history.steps[-1]:,}" if len(history.steps) > 1 else ""
    where = f"{layers}, {span or f'step {history.steps[0]:,}'}"
    if len(history.steps) < 3:
        only = "one step was" if len(history.steps) == 1 else "two steps were"
        where += f"; only {only} logged, too little to judge a course"
    if faults:
        return f"Something broke: {faults} fault{'s' * (faults > 1)} in {where}."
    if warnings:
        many = "one thing needs" if warnings == 1 else f"{warnings} things need"
        return f"The run went through, and {many} a look ({where})."
    if any(x.severity == "good" for x in found):
        return f"Nothing stands out in {where}, and what theory predicts came true."
    return f"Nothing stands out in {where}."
