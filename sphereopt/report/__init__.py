"""Read a run's files, draw its figures, and write one page that shows them."""

from sphereopt.report.page import render, write
from sphereopt.report.verdict import Finding, verdict

__all__ = ["Finding", "render", "verdict", "write"]
