"""Optimizers that move weights on their spheres."""

from sphereopt.optim.adam import SphereAdam
from sphereopt.optim.base import Reading, SphereError, SphereOptimizer
from sphereopt.optim.sgd import SphereSGD

__all__ = ["Reading", "SphereAdam", "SphereError", "SphereOptimizer", "SphereSGD"]
