"""Optimizers that move weights on their spheres."""

from sphereopt.optim.adam import SphereAdam
from sphereopt.optim.base import Keys, Reading, Slab, SphereError, SphereOptimizer
from sphereopt.optim.lion import SphereLion
from sphereopt.optim.muon import SphereMuon
from sphereopt.optim.sgd import SphereSGD

__all__ = [
    "Keys",
    "Reading",
    "Slab",
    "SphereAdam",
    "SphereError",
    "SphereLion",
    "SphereMuon",
    "SphereOptimizer",
    "SphereSGD",
]
