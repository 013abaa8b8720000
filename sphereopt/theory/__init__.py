"""Learning rate, weight decay, norm and angle: what follows from what.

Plain Python and numpy: nothing here needs a model, and only what reads a live optimizer or
scheduler needs torch.
"""

from sphereopt.theory.angles import angle_schedule, lr_for_angles
from sphereopt.theory.answer import Answer, answer
from sphereopt.theory.convert import alignment, for_batch_size, for_steps, init_std, translate
from sphereopt.theory.diagnosis import (
    Invariance,
    Settling,
    at_equilibrium,
    is_invariant,
    radial_share,
)
from sphereopt.theory.equilibrium import Equilibrium, equilibrium
from sphereopt.theory.errors import OutOfRangeError
from sphereopt.theory.exact import (
    DecayFree,
    adamc,
    rescaled,
    sphere_sgd_lr,
    without_weight_decay,
)
from sphereopt.theory.live import SphereLr, sphere_lr
from sphereopt.theory.logs import (
    K_from_angles,
    K_measured,
    norm_from_gradients,
    norm_from_updates,
)
from sphereopt.theory.rules import OPTIMIZERS, Hyperparameters
from sphereopt.theory.schedules import SCHEDULES, schedule
from sphereopt.theory.settings import SPHERE_OPTIMIZERS, Settings
from sphereopt.theory.trajectory import Trajectory, trajectory

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SPHERE_OPTIMIZERS",
    "Answer",
    "DecayFree",
    "Equilibrium",
    "Hyperparameters",
    "Invariance",
    "K_from_angles",
    "K_measured",
    "OutOfRangeError",
    "Settings",
    "Settling",
    "SphereLr",
    "Trajectory",
    "adamc",
    "alignment",
    "angle_schedule",
    "answer",
    "at_equilibrium",
    "equilibrium",
    "for_batch_size",
    "for_steps",
    "init_std",
    "is_invariant",
    "lr_for_angles",
    "norm_from_gradients",
    "norm_from_updates",
    "radial_share",
    "rescaled",
    "schedule",
    "sphere_lr",
    "sphere_sgd_lr",
    "trajectory",
    "translate",
    "without_weight_decay",
]
