"""What changed between two runs: as values, text, JSON and a page."""

from sphereopt.report.diff.difference import TOLERANCE, Diff, Layer, Lost, Metric, diff
from sphereopt.report.diff.page import render_diff, write_diff

__all__ = ["TOLERANCE", "Diff", "Layer", "Lost", "Metric", "diff", "render_diff", "write_diff"]
