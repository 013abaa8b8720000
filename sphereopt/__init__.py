"""Train normalized networks on the spheres where their scale-invariant weights live."""

import importlib
from types import ModuleType

from sphereopt import diagnostics as diagnostics
from sphereopt import geometry as geometry
from sphereopt import monitor as monitor
from sphereopt import moves as moves
from sphereopt import nn as nn
from sphereopt import optim as optim
from sphereopt import report as report
from sphereopt import theory as theory
from sphereopt.detect import find_spheres
from sphereopt.groups import param_groups
from sphereopt.monitor import Tracker, track
from sphereopt.optim import SphereAdam, SphereLion, SphereMuon, SphereOptimizer, SphereSGD
from sphereopt.optim.constrain import constrain

__version__ = "0.1.0"

__all__ = [
    "SphereAdam",
    "SphereLion",
    "SphereMuon",
    "SphereOptimizer",
    "SphereSGD",
    "Tracker",
    "constrain",
    "diagnostics",
    "find_spheres",
    "geometry",
    "manifold",
    "monitor",
    "moves",
    "nn",
    "optim",
    "param_groups",
    "report",
    "theory",
    "track",
]


def __getattr__(name: str) -> ModuleType:
    if name == "manifold":  # it needs geoopt, which nothing else does
        return importlib.import_module("sphereopt.manifold")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
