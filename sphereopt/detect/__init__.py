"""Detection of scale-invariant weights."""

from .find import find_spheres
from .report import Evidence, Finding, SphereReport

__all__ = ["Evidence", "Finding", "SphereReport", "find_spheres"]
