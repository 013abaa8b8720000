"""What a comparison run returns: plain frozen values, ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sphereopt.train.config import Config
from sphereopt.train.forecast import ForecastPoint

__all__ = ["ArmResult", "NormPoint", "Quartiles", "Results", "mean_angles", "second_half"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Quartiles:
    """Three quantiles of a number over all spheres."""

    q25: float
    median: float
    q75: float


@dataclass(frozen=True)
class NormPoint:
    """Norms of all spheres after a step.

    Attributes:
        step: Steps made.
        believed: Norm the optimizer believes: the stored one, or the virtual radius.
        stored: Norm of the stored weights.
    """

    step: int
    believed: Quartiles
    stored: Quartiles


@dataclass(frozen=True)
class ArmResult:
    """What one arm did.

    Attributes:
        letter: How texts refer to it.
        optimizer: The optimizer in words.
        test_accuracy: Share of all test images classified correctly, after the last step.
        angle: Mean over the second half of the logged steps and over spheres, in radians per step.
        predicted_angle: Equilibrium angle of the first arm at the same steps, averaged.
        loss_gap: Largest difference to the training loss of the first arm, over all steps.
        norm_gap: Largest relative difference of a sphere's believed norm to the first arm's.
        stored_drift: Largest relative change of a sphere's stored norm since the start.
        loss: Training loss of every step.
        accuracy: (step, share correct) on ``Results.curve_images`` test images.
        norms: Norms at the start and at every logged step.
        angles: (step, mean angle over all spheres) at every logged step.
        seconds: Wall time.
    """

    letter: str
    optimizer: str
    test_accuracy: float
    angle: float
    predicted_angle: float
    loss_gap: float
    norm_gap: float
    stored_drift: float
    loss: Sequence[float]
    accuracy: Sequence[tuple[int, float]]
    norms: Sequence[NormPoint]
    angles: Sequence[tuple[int, float]]
    seconds: float


@dataclass(frozen=True)
class Results:
    """What a comparison run did.

    Attributes:
        config: Its options.
        recipe: What the options do not say, in words.
        data: Name and sizes of the data.
        spheres: Parameter name to sphere spec, as ``find_spheres`` found them.
        sphere_count: Number of spheres.
        predicted: (step, equilibrium angle of the first arm), at every logged step.
        forecast: Norm and angle of the first arm as the calculator has them from its initial norms
            and gradient norms, at every logged step.
        log_every: Steps between two rows of the JSONL files.
        curve_images: Test images behind each point of the accuracy curves.
        arms: Name to result, in the order of the arms.
        versions: Software.
        seconds: Wall time in all.
    """

    config: Config
    recipe: Mapping[str, str]
    data: Mapping[str, Any]
    spheres: Mapping[str, str]
    sphere_count: int
    predicted: Sequence[tuple[int, float]]
    forecast: Sequence[ForecastPoint]
    log_every: int
    curve_images: int
    arms: Mapping[str, ArmResult]
    versions: Mapping[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts of plain values, ready for ``json.dumps``."""
        return asdict(self)


def mean_angles(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """Return the mean angle over all spheres at every logged step.

    Args:
        rows: Rows of a tracker.

    Returns:
        Steps made, and radians per step.
    """
    means = []
    for row in rows:
        entries = row["parameters"].values()
        total = math.fsum(entry["count"] * entry["angle"]["mean"] for entry in entries)
        means.append((int(row["step"]), total / sum(entry["count"] for entry in entries)))
    return means


def second_half(series: Sequence[tuple[int, float]], config: Config) -> float:
    """Return the mean of a logged series over the second half of a run.

    Args:
        series: Steps and values.
        config: The run's options.

    Returns:
        The mean.

    Example:
        >>> second_half([(1, 5.0), (2, 7.0), (3, 1.0), (4, 2.0)], Config(steps=4))
        1.5
    """
    late = [value for step, value in series if step > config.steps // 2]
    return math.fsum(late) / len(late)
