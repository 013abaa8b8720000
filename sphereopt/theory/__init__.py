"""Learning rate, weight decay, norm and angle: what follows from what.

Plain Python and numpy: nothing here needs a model, and only what reads a live optimizer or
scheduler needs torch.
"""

from sphereopt.theory.equilibrium import Equilibrium, equilibrium
from sphereopt.theory.errors import OutOfRangeError
from sphereopt.theory.rules import OPTIMIZERS, Hyperparameters
from sphereopt.theory.schedules import SCHEDULES, schedule
from sphereopt.theory.trajectory import Trajectory, trajectory

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Equilibrium",
    "Hyperparameters",
    "OutOfRangeError",
    "Trajectory",
    "equilibrium",
    "schedule",
    "trajectory",
]
