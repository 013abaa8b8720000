"""Detection of scale-invariant weights, with proof."""

from .certify import DetectionError
from .find import find_spheres
from .report import Evidence, Finding, SphereReport

__all__ = ["DetectionError", "Evidence", "Finding", "SphereReport", "find_spheres"]
