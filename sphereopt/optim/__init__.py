"""Optimizers that move weights on their spheres."""

from sphereopt.optim.adam import SphereAdam
from sphereopt.optim.base import Keys, Reading, Slab, SphereError, SphereOptimizer
from sphereopt.optim.constrain import Constraint
from sphereopt.optim.lion import SphereLion
from sphereopt.optim.muon import SphereMuon
from sphereopt.optim.recorder import NormRecorder
from sphereopt.optim.schedules import RadiusReplay, RadiusSchedule
from sphereopt.optim.sgd import SphereSGD

__all__ = [
    "Constraint",
    "Keys",
    "NormRecorder",
    "RadiusReplay",
    "RadiusSchedule",
    "Reading",
    "Slab",
    "SphereAdam",
    "SphereError",
    "SphereLion",
    "SphereMuon",
    "SphereOptimizer",
    "SphereSGD",
]
