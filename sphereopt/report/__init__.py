"""Read a run's log: its figures, what stands out in it, and one page that shows both."""

from sphereopt.report import instruments
from sphereopt.report.diff import Diff, diff, render_diff, write_diff
from sphereopt.report.findings import Finding, findings
from sphereopt.report.history import History, as_history
from sphereopt.report.page import render, write

__all__ = [
    "Diff",
    "Finding",
    "History",
    "as_history",
    "diff",
    "findings",
    "instruments",
    "render",
    "render_diff",
    "write",
    "write_diff",
]
