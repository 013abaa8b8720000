"""What stands out in a measurement, in words; all thresholds, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from sphereopt.diagnostics.amplify import Normalizer
    from sphereopt.diagnostics.signal import Layer

__all__ = ["Finding", "of_amplification", "of_propagation"]

#: Mean cosine of two samples. 20 convolutions without normalizer or with LayerNorm reach 0.93 on
#: digits and hardly learn in 80 steps; GroupNorm with groups of 8 (0.87) and 4 (0.76) does better,
#: BatchNorm (0.43) best. docs/results/propagation.json
SIMILAR = 0.9
#: Gradient norm, first layer over last. The same network with BatchNorm reaches 52 and learns best
#: of all: what is twice that is not what a sound network does. docs/results/propagation.json
EXPLODING = 100.0
#: Variance, last layer over first. 20 residual blocks with BatchNorm reach about 6, on a line.
GROWING = 100.0
#: Share of channels: a ReLU that is off for half of what it was given is more than bad luck.
DEAD = 0.5
#: Scale of a batch over the running one. The scale of 64 values is known to 9 % (one standard
#: deviation); this is nearly three of them, and the median of channels is closer than one.
STALE = 1.25


@final
@dataclass(frozen=True)
class Finding:
    """One thing that stands out.

    Attributes:
        name: What it is, one of ``"not finite"``, ``"dead"``, ``"similar"``, ``"growing"``,
            ``"shrinking"``, ``"exploding"``, ``"vanishing"``, ``"no gradient"``, ``"stale"``.
        layers: The layers concerned.
        value: The number that crossed the threshold.
        sentence: What, where and how much, and what to try.
    """

    name: str
    layers: tuple[str, ...]
    value: float
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def of_propagation(
    layers: Sequence[Layer], samples: int, explosion: float | None
) -> tuple[Finding, ...]:
    """Return what stands out in the rows of :func:`sphereopt.diagnostics.propagation`.

    Args:
        layers: The rows, in the order they ran.
        samples: Samples of the batch.
        explosion: First gradient norm over last.

    Returns:
        Findings: what is broken, then what is dead, then what will be slow.
    """
    found = [*_not_finite(layers), *_dead(layers), *_no_gradient(layers)]
    found += [*_similar(layers, samples), *_growing(layers), *_exploding(layers, explosion)]
    return tuple(found)


def _place(layers: Sequence[Layer], layer: Layer) -> str:
    return f"layer {layers.index(layer) + 1} of {len(layers)} ({layer.label})"


def _named(layers: Sequence[Layer], shown: int = 4) -> str:
    more = len(layers) - shown
    names = ", ".join(layer.label for layer in layers[:shown])
    return names + (f" and {more} more" if more > 0 else "")


def _not_finite(layers: Sequence[Layer]) -> list[Finding]:
    found = []
    kinds: list[tuple[str, Callable[[Layer], float | None], int]] = [
        ("activations", lambda layer: layer.lost, 0),
        ("gradients", lambda layer: layer.grad_lost, -1),
    ]
    for what, share, first in kinds:
        bad = [layer for layer in layers if share(layer)]
        if bad:
            # Forward, what is lost first is lost in the first layer; backward, in the last.
            start = bad[first]
            value = share(start) or 0.0
            sentence = (
                f"{what} are NaN or infinite in {len(bad)} layers, from "
                f"{_place(layers, start)} on, {value:.2g} of its entries: try float32 or bfloat16, "
                "smaller weights, or a normalizer there"
            )
            found.append(Finding("not finite", tuple(x.label for x in bad), value, sentence))
    return found


def _dead(layers: Sequence[Layer]) -> list[Finding]:
    bad = [layer for layer in layers if layer.dead >= DEAD and not layer.lost]
    if not bad:
        return []
    worst = max(bad, key=lambda layer: layer.dead)
    sentence = (
        f"{worst.dead:.0%} of the channels of {_place(layers, worst)} are the same for every input"
        + (f", and at least {DEAD:.0%} in {_named(bad)}" if len(bad) > 1 else "")
        + ": they learn nothing from this batch; try a lower learning rate, a normalizer before "
        "the activation, or one without a zero side (nothing is wrong behind a zero-initialised "
        "gain)"
    )
    return [Finding("dead", tuple(layer.label for layer in bad), worst.dead, sentence)]


def _no_gradient(layers: Sequence[Layer]) -> list[Finding]:
    bad = [layer for layer in layers if layer.grad_norm == 0]
    if not bad:
        return []
    sentence = (
        f"no gradient reaches {_named(bad)}: a zero gain, zero weights or a dead layer comes after "
        "(as meant at the start behind SkipInit or a zero-initialised gamma)"
    )
    return [Finding("no gradient", tuple(layer.label for layer in bad), 0.0, sentence)]


def _similar(layers: Sequence[Layer], samples: int) -> list[Finding]:
    hidden = [x for x in layers if x.similarity is not None and math.isfinite(x.similarity)]
    # The output's few numbers are alike or not for reasons of the task.
    hidden = hidden[:-1] if len(hidden) > 1 and layers[-1].role == "weights" else hidden
    if not hidden or (value := hidden[-1].similarity or 0.0) < SIMILAR:
        return []
    last = hidden[-1]
    first = next(x for x in hidden if (x.similarity or 0.0) >= SIMILAR)
    rank = "" if last.stable_rank is None else f" and stable rank {last.stable_rank:.2g}"
    sentence = (
        f"activations of different inputs have cosine {value:.2f}{rank} (of {samples} samples) at "
        f"{_place(layers, last)}, first {SIMILAR} at {_place(layers, first)}: expect slow "
        "training; try BatchNorm, smaller groups in GroupNorm, or skip connections"
    )
    return [Finding("similar", (last.label,), value, sentence)]


def _growing(layers: Sequence[Layer]) -> list[Finding]:
    rows = [x for x in layers if x.role == "activation"]
    if len(rows) < 4:
        rows = [x for x in layers if x.role == "weights"]
    values = [x.variance for x in rows]
    if len(values) < 4 or not all(math.isfinite(v) and v > 0 for v in values):
        return []
    ends = (rows[0].label, rows[-1].label)
    ratio = values[-1] / values[0]
    if ratio <= 1 / GROWING:
        sentence = (
            f"activation variance shrinks {1 / ratio:.3g} times from {ends[0]} to {ends[1]}: try "
            "an initialization for this activation (Kaiming), or normalizers"
        )
        return [Finding("shrinking", ends, ratio, sentence)]
    # Where branches and the sum of branches take turns, the sum is what grows.
    highest = np.array(list(accumulate(values, max)))
    slope, exponential = _fit(np.log2(highest))
    if highest[-1] / highest[0] < GROWING or exponential <= _fit(highest)[1]:
        return []
    ratio = float(highest[-1] / highest[0])
    sentence = (
        f"activation variance grows exponentially with depth, {ratio:.3g} times from {ends[0]} to "
        f"{ends[1]}, doubling every {1 / slope:.2g} of {len(values)} activations; in residual "
        "networks with normalizers on activations it grows linearly: try one, or SkipInit"
    )
    return [Finding("growing", ends, ratio, sentence)]


def _fit(values: np.ndarray) -> tuple[float, float]:
    """Return slope and R^2 of the straight line through values over 0, 1, 2, ..."""
    places = np.arange(len(values))
    slope, start = np.polyfit(places, values, 1)
    left = values - (start + slope * places)
    total = ((values - values.mean()) ** 2).sum()
    return float(slope), float(1 - (left**2).sum() / total) if total > 0 else 0.0


def _exploding(layers: Sequence[Layer], explosion: float | None) -> list[Finding]:
    if explosion is None or not math.isfinite(explosion) or explosion == 0:
        return []
    ends = [x for x in layers if x.role == "weights" and x.grad_norm is not None]
    names = (ends[0].label, ends[-1].label)
    if explosion >= EXPLODING:
        sentence = (
            f"the gradient's norm grows {explosion:.3g} times on its way back to {names[0]}: try "
            "warm-up or a lower learning rate, larger groups in GroupNorm, or skip connections"
        )
        return [Finding("exploding", names, explosion, sentence)]
    if explosion <= 1 / EXPLODING:
        sentence = (
            f"the gradient's norm shrinks {1 / explosion:.3g} times on its way back to {names[0]}: "
            "try an initialization for this activation (Kaiming), normalizers, or skip connections"
        )
        return [Finding("vanishing", names, explosion, sentence)]
    return []


def of_amplification(rows: Sequence[Normalizer]) -> tuple[Finding, ...]:
    """Return what stands out in the rows of :func:`sphereopt.diagnostics.amplification`."""
    found = []
    bad = [row for row in rows if row.stale is not None and not 1 / STALE <= row.stale <= STALE]
    if bad:
        worst = max(bad, key=lambda row: abs(math.log(row.stale or 1.0)))
        value = worst.stale or 1.0
        effect = "amplifies" if value > 1 else "damps"
        others = f", and {len(bad) - 1} more normalizers" if len(bad) > 1 else ""
        sentence = (
            f"the batch's scale is {value:.3g} times the running one at {worst.name}{others}: in "
            f"eval() it {effect} every perturbation by as much; pass training data through the "
            "model in train() before judging its robustness"
        )
        found.append(Finding("stale", tuple(row.name for row in bad), value, sentence))
    lost = [
        row.name
        for row in rows
        if any(not math.isfinite(k) for k in (*row.before.values(), *row.after.values()))
    ]
    if lost:
        sentence = f"activations are NaN or infinite at {lost[0]} ({len(lost)} normalizers)"
        found.append(Finding("not finite", tuple(lost), math.nan, sentence))
    return tuple(found)
