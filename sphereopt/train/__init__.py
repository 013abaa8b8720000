"""The main job: train a small network plainly and on its spheres, and compare the two."""

from sphereopt.train.config import Config, OptionError, learning_rate, predicted_angle
from sphereopt.train.data import Dataset, load
from sphereopt.train.folder import fresh_folder
from sphereopt.train.loop import DivergedError, train
from sphereopt.train.results import ArmResult, Results

__all__ = [
    "ArmResult",
    "Config",
    "Dataset",
    "DivergedError",
    "OptionError",
    "Results",
    "fresh_folder",
    "learning_rate",
    "load",
    "predicted_angle",
    "train",
]
