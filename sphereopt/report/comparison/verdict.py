"""A comparison run in sentences, built from its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sphereopt.report.comparison.summary import number

__all__ = ["Finding", "verdict"]

Results = Mapping[str, Any]

#: Curves closer than this are the same curve; what is left is rounding, amplified.
SAME = 1e-6
#: An angle this close to the predicted one counts as predicted.
CLOSE = 0.05


@dataclass(frozen=True)
class Finding:
    """A question, whether the run answers it with yes, and how.

    Attributes:
        holds: True, False, or None where the run cannot tell.
        headline: The answer in a few words.
        text: The numbers.
    """

    holds: bool | None
    headline: str
    text: str


def verdict(results: Results) -> list[Finding]:
    """Return what a comparison run shows, and plainly where it falls short.

    Args:
        results: A comparison run's results, as its ``results.json`` holds them.

    Returns:
        Findings on: does (b) follow (a), does (a) turn as predicted, does (c) turn as told, and
        what the accuracies say.
    """
    return [_following(results), _turning(results), _told(results), _accuracy(results)]


def _following(results: Results) -> Finding:
    free, config = results["arms"]["free"], results["config"]
    steps, gap = config["steps"], free["loss_gap"]
    if gap <= SAME:
        return Finding(
            True,
            "(b) followed (a)",
            f"In {steps:,} steps their training losses never differed by more than {number(gap)}, "
            f"nor the virtual radius of any sphere in (b) from its norm in (a) by more than "
            f"{number(free['norm_gap'])} of it, while the norms that (b) stores moved by no "
            f"more than {number(free['stored_drift'])} of themselves.",
        )
    early = max(1, steps // 20)
    pairs = zip(free["loss"][:early], results["arms"]["sgd"]["loss"][:early], strict=True)
    return Finding(
        False,
        "(b) parted from (a)",
        f"Their training losses differ by up to {number(gap)}, and in the first {early:,} of "
        f"{steps:,} steps by up to {number(max(abs(x - y) for x, y in pairs))}. In "
        f"{config['dtype']} with a norm eps of {config['norm_eps']:g} the runs differ at first by "
        "rounding and by the eps, which counts for more where weights are smaller, and training "
        "multiplies every difference. The norms that (b) stores moved by no more than "
        f"{number(free['stored_drift'])} of themselves.",
    )


def _turning(results: Results) -> Finding:
    sgd, half = results["arms"]["sgd"], results["config"]["steps"] // 2
    late = [point["angle"] for point in results["forecast"] if point["step"] > half]
    calculated = math.fsum(late) / len(late)
    ratio = sgd["angle"] / calculated
    side = "more" if ratio > 1 else "less"
    numbers = (
        f"Over the second half of the run its weights turned {sgd['angle']:.5f} rad per step on "
        f"average. The calculator says {calculated:.5f} from the initial norms and the size of the "
        f"gradients, so it is {100 * abs(ratio - 1):.0f} % {side}; with norms that had settled at "
        f"every learning rate it would be {sgd['predicted_angle']:.5f}."
    )
    if abs(ratio - 1) <= CLOSE:
        return Finding(True, "(a) turned as fast as calculated", numbers)
    reasons = (
        " The calculator takes gradients for noise: what persists of them turns the weights "
        "faster, what reverts slower. It gives a root mean square, and a mean is never above that."
    )
    pace = "faster" if ratio > 1 else "slower"
    return Finding(False, f"(a) turned {pace} than calculated", numbers + reasons)


def _told(results: Results) -> Finding:
    fixed = results["arms"]["fixed"]
    off = abs(fixed["angle"] / fixed["predicted_angle"] - 1)
    return Finding(
        off <= 1e-3,
        "(c) turned by its learning rate" if off <= 1e-3 else "(c) did not turn by its rate",
        f"Its weights turned {fixed['angle']:.5f} rad per step where the learning rate, the angle "
        f"that theory gives for (a), was {fixed['predicted_angle']:.5f} on average. That is so by "
        "construction: on a fixed sphere there is no norm to settle first. The stored norms moved "
        f"by no more than {number(fixed['stored_drift'])} of themselves.",
    )


def _accuracy(results: Results) -> Finding:
    count = results["data"]["test_images"]
    shares = ", ".join(
        f"({arm['letter']}) {100 * arm['test_accuracy']:.1f} %" for arm in results["arms"].values()
    )
    return Finding(
        None,
        "The accuracies do not rank the arms",
        f"{shares}. One of the {count:,} test images is {100 / count:.2g} points, this is one "
        "seed, and nothing was tuned for accuracy.",
    )
