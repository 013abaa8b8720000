"""Logs of any size without training: plausible dynamics from the growth law, some layers odd."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

STATS = ("mean", "min", "q25", "median", "q75", "max")
PROBES = (
    *("norm", "angle", "effective_lr", "relative_update", "radial_share", "grad_radial_share"),
    *("scaled_grad_norm", "growth", "growth_law", "momentum_alignment", "K_measured"),
    *("equilibrium_norm", "equilibrium_angle"),
)
#: How the spheres of a parameter lie around their median: in units of the layer's spread.
_AROUND = np.array([0.05, -1.0, -0.3, 0.0, 0.3, 1.2])
ODD = ("still", "fast", "radial", "growing", "nan", "late", "gone")


def make_rows(
    steps: int,
    layers: int,
    *,
    every: int = 1,
    start: int = 0,
    odd: Sequence[str] = (),
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    total: int | None = None,
    seed: int = 0,
    loss: bool = True,
) -> Iterator[dict]:
    """Yield the rows of steps start+1 ... start+steps, as ``track`` would log them for SGD.

    ``odd`` makes the last layers odd, one kind each: "still" (no gradient: never turns, only
    decays), "fast" (turns 5 times as fast), "radial" (not scale-invariant: gradients point along
    the weights), "growing" (no weight decay), "nan" (null from half of the run on), "late" (logged
    from half of the run on), "gone" (logged until half of the run). Warm-up over a twentieth of
    ``total`` steps, then a cosine to zero. The same arguments give the same rows, and two calls
    with ``start`` give what one call gives.
    """
    total = start + steps if total is None else total
    kinds = [""] * (layers - len(odd)) + list(odd)
    assert set(kinds) <= {"", *ODD}
    sizes = np.random.default_rng(seed).uniform(0.5, 2.0, layers)  # of the gradient at norm 1
    sizes[[k == "still" for k in kinds]] = 0.0
    decay = np.where([k == "growing" for k in kinds], 0.0, weight_decay)
    norm = np.linspace(1.0, 3.0, layers)
    for step in range(every, start + steps + 1, every):
        rate = lr * _schedule(step / total)
        before, norm = norm, _law(norm, rate, decay, sizes, momentum, every)
        if step > start:
            noise = np.random.default_rng([seed, step]).normal(0, 0.03, layers)
            numbers = _numbers(before, norm, rate, decay, sizes, momentum, kinds, noise, every)
            yield _row(step, step / total, kinds, rate, decay, numbers, loss)


def make_run(layers: int, *, start: int = 0, every: int = 1, **more) -> dict:
    """Return a run's header, what a file holds under ``{"run": ...}``."""
    group = {"names": [name(i) for i in range(layers)], "sphere": "row", "kind": "proved"}
    return {
        **{"format": 1, "sphereopt": "0.1.0", "time": "2026-11-21T20:00:00+00:00", "start": start},
        **{"every": {"0": every}, "window": 100, "optimizer": "SGD", "rule": "sgd"},
        **{"device": "cpu", "probes": [*PROBES, "diffusive_angle"]},
        "versions": {"python": "3.11.2", "torch": "2.13.0+cpu", "numpy": "2.4.6"},
        "groups": [{**group, "lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9}],
        "config": {},
        **more,
    }


def write_log(path: str | Path, rows, runs: Sequence[dict] = (), *, append: bool = False) -> Path:
    """Write headers and rows as JSON lines."""
    path = Path(path)
    with path.open("a" if append else "w", encoding="utf-8") as file:
        for item in ({"run": run} for run in runs):
            file.write(json.dumps(item, separators=(",", ":")) + "\n")
        for row in rows:
            file.write(json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n")
    return path


def name(layer: int) -> str:
    """Return the name of a layer's weight."""
    return f"layer{layer}.conv.weight"


def _schedule(share: float) -> float:
    return share / 0.05 if share < 0.05 else 0.5 * (1 + math.cos(math.pi * share))


def _law(norm, rate, decay, sizes, momentum, steps):
    """Return the norms some steps later: rho^4 relaxes to lr g^2 / (2 decay (1 - momentum))."""
    push = 2 * (rate * sizes / (1 - momentum)) ** 2
    pull = 4 * rate * decay / (1 - momentum)
    shrink = np.exp(-pull * steps)
    stretch = np.where(pull > 0, (1 - shrink) / np.where(pull > 0, pull, 1), steps)
    return (norm**4 * shrink + push * stretch) ** 0.25


def _numbers(before, norm, rate, decay, sizes, momentum, kinds, noise, every):
    """Return probe -> medians of the layers."""
    odd = np.array(kinds)
    radial = np.where(odd == "radial", -0.4, 0.0)
    turn = np.where(odd == "fast", 5.0, 1.0) * np.exp(noise)
    angle = turn * rate * sizes / math.sqrt(1 - momentum**2) / norm**2
    growth = (norm / before) ** (1 / every) - 1
    settled = np.sqrt(2 * rate * decay / (1 + momentum))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = settled**2 / angle**2
        equilibrium = (rate * sizes**2 / (2 * decay * (1 - momentum))) ** 0.25
    return {
        "norm": norm,
        "angle": angle,
        "effective_lr": rate / norm**2,
        "relative_update": angle,
        "radial_share": radial - 0.02 * (1 + noise),
        "grad_radial_share": radial + 1e-8 * noise,
        "scaled_grad_norm": sizes * np.exp(noise),
        "growth": growth,
        "growth_law": growth * np.exp(noise),
        "momentum_alignment": 0.4 + noise,
        "K_measured": found,
        "equilibrium_norm": equilibrium,
        "equilibrium_angle": settled,
    }


def _row(step, share, kinds, rate, decay, numbers, loss):
    with np.errstate(invalid="ignore"):
        tables = {
            probe: (values[:, None] + 0.1 * np.abs(values)[:, None] * _AROUND).tolist()
            for probe, values in numbers.items()
        }
    parameters = {}
    for i, kind in enumerate(kinds):
        if (kind == "late" and share <= 0.5) or (kind == "gone" and share > 0.5):
            continue
        broken = kind == "nan" and share > 0.5
        parameters[name(i)] = {
            **{"sphere": "row", "kind": "proved", "lr": rate},
            **{"weight_decay": float(decay[i]), "count": 16 * (i + 1)},
            **{
                probe: {
                    stat: x if math.isfinite(x) and not broken else None
                    for stat, x in zip(STATS, table[i], strict=True)
                }
                for probe, table in tables.items()
                if decay[i] > 0 or not (probe == "K_measured" or "equilibrium" in probe)
            },
        }
    metrics = {"metrics": {"loss": 0.1 + 2 * math.exp(-5 * share)}} if loss else {}
    return {"step": step, **metrics, "parameters": parameters}
