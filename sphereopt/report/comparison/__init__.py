"""One network trained plainly and on its spheres: the page that ``sphereopt train`` writes."""

from sphereopt.report.comparison.page import render, write
from sphereopt.report.comparison.verdict import Finding, verdict

__all__ = ["Finding", "render", "verdict", "write"]
