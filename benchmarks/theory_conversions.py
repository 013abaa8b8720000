"""Conversions at work: runs without decay, on spheres by a schedule of angles, in larger batches.

    python benchmarks/theory_conversions.py --write docs/results/theory_conversions.json

*Removal*: how far directions are from those of the run with decay, with learning rates that are
said to replace it (networks and optimizers of tests/theory_nets.py, float64). *Angles*: AdamW, and
SphereAdam with three schedules of angles. *Batch*: AdamW at batch size 16, and at 64 with the
settings of ``for_batch_size`` and others. The last two on the LayerNorm network of
``theory_networks.py``; losses are on all digits, with the right labels.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from theory_networks import build, digits
from torch import nn
from torch.nn import functional

import sphereopt as so
from sphereopt.theory import (
    angle_schedule,
    equilibrium,
    for_batch_size,
    schedule,
    without_weight_decay,
)

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import theory_nets

MATRICES = ("0.weight", "3.weight")
LR, DECAY, BETAS = 4.5e-3, 0.22, (0.9, 0.95)
STEPS, BATCH_STEPS, EVERY = 2000, 3200, 40
SGD_LR, SGD_DECAY, MU = 0.1, 0.01, 0.9


def removal_rates(steps: int) -> dict[str, tuple[str, np.ndarray, np.ndarray | None]]:
    """Return for each claim the optimizer, its learning rates and gradient scales."""
    t = np.arange(steps)
    middle = (1 + MU - SGD_LR * SGD_DECAY) / 2
    alpha = middle + math.sqrt(middle**2 - MU)
    given = {"lr": SGD_LR, "weight_decay": SGD_DECAY, "steps": steps, "dtype": "float64"}
    heavy = without_weight_decay("sgd", momentum=MU, **given)
    adam = without_weight_decay("adamw", lr=LR, weight_decay=1.0, steps=steps, betas=BETAS)
    return {
        "SGD: A": ("sgd", heavy.lr, None),
        "SGD: alpha from an empty buffer": ("sgd", SGD_LR * alpha ** -(2 * t + 1.0), None),
        "SGD: 1 - lr decay": ("sgd", SGD_LR * (1 - SGD_LR * SGD_DECAY) ** -(2 * t + 1.0), None),
        "Nesterov: A": ("nesterov", heavy.lr, None),
        "AdamW: A, gradients / A": ("adamw", adam.lr, adam.grad_scale),
        "AdamW: A": ("adamw", adam.lr, None),
        "AdamW: A twice, as for SGD": ("adamw", adam.lr * adam.grad_scale, None),
    }


def removal(kind: str, steps: int) -> dict[str, list[float]]:
    """Return for each claim the distance of directions after every step."""
    hyper = {
        "sgd": {"momentum": MU},
        "nesterov": {"momentum": MU, "nesterov": True},
        "adamw": {"betas": BETAS},
    }
    given = {"adamw": (LR, 1.0)}
    result = {}
    for label, (name, rates, scales) in removal_rates(steps).items():
        lr, decay = given.get(name, (SGD_LR, SGD_DECAY))
        real, own = "adamw" if name == "adamw" else "sgd", hyper[name]
        run = theory_nets.train(real, kind, np.full(steps, lr), np.full(steps, decay), **own)
        free = theory_nets.train(real, kind, rates, np.zeros(steps), scales=scales, **own)
        result[label] = [theory_nets.apart([a], [b], kind) for a, b in zip(run, free, strict=True)]
    return result


def evaluate(model: nn.Module) -> float:
    x, y = digits()
    with torch.no_grad():
        return functional.cross_entropy(model(x), y).item()


def curve(
    seed: int, size: int, steps: int, every: int, plan: Callable[[nn.Module], tuple[Any, Any]]
) -> list[float]:
    """Train with the optimizer and the schedule that ``plan`` makes; return losses."""
    model, batches = build("LayerNorm", seed, size=size)
    optimizer, rates = plan(model)
    named = dict(model.named_parameters())
    # All else learns per sample, at the same rate in all arms.
    others = torch.optim.SGD(
        [p for n, p in named.items() if n not in MATRICES], lr=0.03 * size / 16
    )
    losses = []
    for t in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = float(rate[t])
        x, y = next(batches)
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        others.step()
        if (t + 1) % every == 0:
            losses.append(evaluate(model))
    return losses


def matrices(model: nn.Module) -> list[nn.Parameter]:
    named = dict(model.named_parameters())
    return [named[n] for n in MATRICES]


def adamw(rates: np.ndarray, decay: float) -> Callable[[nn.Module], tuple[Any, Any]]:
    def plan(model: nn.Module) -> tuple[Any, Any]:
        return torch.optim.AdamW(matrices(model), weight_decay=decay, betas=BETAS), [rates]

    return plan


def on_spheres(
    angles: Callable[[nn.Parameter], np.ndarray],
) -> Callable[[nn.Module], tuple[Any, Any]]:
    def plan(model: nn.Module) -> tuple[Any, Any]:
        groups = [{"params": [p], "sphere": "tensor"} for p in matrices(model)]
        made = so.SphereAdam(groups, betas=BETAS)
        return made, [angles(p.detach()) for p in matrices(model)]

    return plan


def angle_arms() -> dict[str, Callable[[nn.Module], tuple[Any, Any]]]:
    rates = schedule("cosine", LR, STEPS, warmup=STEPS // 20, final=0.02)
    settled = equilibrium("adamw", lr=LR, weight_decay=DECAY, betas=BETAS).angle

    def predicted(w: torch.Tensor) -> np.ndarray:
        rms0 = w.square().mean().sqrt().item()
        return angle_schedule("adamw", lr=rates, weight_decay=DECAY, rms0=rms0, betas=BETAS)

    return {
        "AdamW": adamw(rates, DECAY),
        "SphereAdam, angle_schedule": on_spheres(predicted),
        "SphereAdam, angle of equilibrium": on_spheres(lambda w: settled * np.sqrt(rates / LR)),
        "SphereAdam, angle as lr": on_spheres(lambda w: settled * rates / LR),
    }


def batch_arms() -> dict[str, tuple[int, float, float]]:
    """Return batch size, learning rate and decay of every arm."""
    choices = for_batch_size("adamw", 4, lr=LR, weight_decay=DECAY, betas=BETAS)
    names = ("lr x 4", "decay x 4", "both x 2")
    arms = {n: (64, c.lr, c.weight_decay) for n, c in zip(names, choices, strict=True)}
    return {
        "batch 16": (16, LR, DECAY),
        **arms,
        "lr x 2": (64, 2 * LR, DECAY),
        "unchanged": (64, LR, DECAY),
    }


def mean_curves(arms: dict[str, Callable[[int], list[float]]], seeds: int) -> dict[str, Any]:
    """Return the mean curve of every arm, and its distance to the first arm's.

    "Later": after the first fifth of the run.
    """
    runs = {name: np.array([arm(seed) for seed in range(seeds)]) for name, arm in arms.items()}
    base = next(iter(runs.values()))
    apart = {name: np.abs(run.mean(0) - base.mean(0)) for name, run in runs.items()}
    return {
        name: {
            "loss": [round(x, 5) for x in run.mean(0).tolist()],
            "final": round(float(run[:, -5:].mean()), 5),
            "distance": round(float(off.mean()), 5),
            "distance later": round(float(off[len(off) // 5 :].mean()), 5),
        }
        for (name, run), off in zip(runs.items(), apart.values(), strict=True)
    }


def measured(seeds: int) -> dict[str, Any]:
    angles = {
        name: lambda seed, plan=plan: curve(seed, 16, STEPS, EVERY, plan)
        for name, plan in angle_arms().items()
    }

    def in_batches(seed: int, size: int, lr: float, decay: float) -> list[float]:
        # A constant rate: where the loss settles shows how much noise the weights turn by.
        steps = BATCH_STEPS * 16 // size
        plan = adamw(schedule("constant", lr, steps, warmup=steps // 20), decay)
        return curve(seed, size, steps, EVERY * 16 // size, plan)

    batch = {
        name: lambda seed, arm=arm: in_batches(seed, *arm) for name, arm in batch_arms().items()
    }
    # Another order of the same data: what seeds alone do.
    batch["batch 16, other batches"] = lambda seed: in_batches(seed + 100, 16, LR, DECAY)
    return {
        "removal": {kind: removal(kind, 300) for kind in ("bn", "ln")},
        "angles": mean_curves(angles, seeds),
        "batch": mean_curves(batch, seeds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    found = measured(args.seeds)
    for kind, runs in found["removal"].items():
        for label, run in runs.items():
            print(f"{kind}  {label:34} {max(run):.2g}")
            runs[label] = [float(f"{x:.3g}") for x in run[4::5]]
    for part in ("angles", "batch"):
        for label, row in found[part].items():
            print(
                f"{part}  {label:34} {row['final']:.4f} "
                f"{row['distance']:.4f} {row['distance later']:.4f}"
            )
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "seeds": args.seeds,
        "steps": {"angles": STEPS, "batch": BATCH_STEPS},
        "adamw": {"lr": LR, "weight_decay": DECAY, "betas": BETAS},
        "sgd": {"lr": SGD_LR, "weight_decay": SGD_DECAY, "momentum": MU},
        "command": "python benchmarks/theory_conversions.py --write "
        "docs/results/theory_conversions.json",
    }
    if args.write:
        args.write.write_text(json.dumps({"about": about, **found}) + "\n")


if __name__ == "__main__":
    main()
