"""Learning rate, weight decay, norm and angle: what follows from what."""

from sphereopt.theory.equilibrium import Equilibrium, equilibrium

__all__ = ["Equilibrium", "equilibrium"]
