"""How much of a step survives in bfloat16 weights, in training: three roundings, several angles.

    python benchmarks/low_precision.py --write docs/results/low_precision.json

A network with BatchNorm learns scikit-learn's digits with all weights in bfloat16. Beside every
step, the same step is made once more in float32; *progress* is the part of the real steps along
those, over their length, and *angle* what the weights turned from step to step, rounding noise
included; 1 and the angle asked for would be perfect.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import sphereopt as so

ROUNDINGS = ("nearest", "stochastic", "master")
ANGLES = (1e-2, 3e-3, 1e-3, 3e-4)
SPHERES = {"0.weight": "row", "3.weight": "row"}


def network(dtype: torch.dtype, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
    layers += [nn.Linear(128, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers).to(dtype)


def digits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.data / 16.0).to(dtype), torch.tensor(data.target)


def make(model: nn.Module, angle: float, rounding: str) -> so.SphereAdam:
    groups = so.param_groups(model, SPHERES)
    for group in groups:
        if group["sphere"] is None:
            group["lr"] = 1e-3
    return so.SphereAdam(groups, lr=angle, rounding=rounding)


def in_float32(
    model: nn.Module, optimizer: so.SphereAdam, angle: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the sphere weights before and after the coming step, were it made in float32."""
    shadow = network(torch.float32, 0)
    shadow.load_state_dict(model.state_dict())
    twin = make(shadow, angle, "nearest")
    state = optimizer.state_dict()
    state["param_groups"] = twin.state_dict()["param_groups"]
    twin.load_state_dict(state)
    for p, q in zip(model.parameters(), shadow.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.float()
        if "master" in optimizer.state[p]:
            q.data.copy_(optimizer.state[p]["master"])
    weights = [dict(shadow.named_parameters())[name] for name in SPHERES]
    before = [w.detach().clone() for w in weights]
    twin.step()
    return list(zip(before, [w.detach() for w in weights], strict=True))


def run(rounding: str, angle: float, steps: int, seed: int) -> dict[str, Any]:
    """Train; return progress, angle and final loss."""
    x, y = digits(torch.bfloat16)
    model = network(torch.bfloat16, seed)
    optimizer = make(model, angle, rounding)
    weights = [dict(model.named_parameters())[name] for name in SPHERES]
    generator = torch.Generator().manual_seed(seed)
    made_good, asked_for, turned, warned = 0.0, 0.0, [], False
    for _ in range(steps):
        pick = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[pick]).float(), y[pick]).backward()
        asked = in_float32(model, optimizer, angle)
        before = [w.detach().float() for w in weights]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        warned |= any("of its step" in str(w.message) for w in caught)
        for w, old, (start, goal) in zip(weights, before, asked, strict=True):
            wish, made = goal - start, w.detach().float() - old
            made_good += (made * wish).sum().item()
            asked_for += (wish * wish).sum().item()
            turned.append(so.geometry.angle(old, w.detach().float(), "row").mean().item())
    with torch.no_grad():
        loss = F.cross_entropy(model(x).float(), y).item()
    return {
        "progress": made_good / asked_for,
        "angle": statistics.fmean(turned),
        "loss": loss,
        "warned": warned,
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw progress against the angle asked for."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for rounding, marker in zip(ROUNDINGS, "osx", strict=True):
        own = [row for row in rows if row["rounding"] == rounding]
        points = [row["angle asked"] for row in own], [row["progress"] for row in own]
        axes.semilogx(*points, marker=marker, label=rounding, markerfacecolor="none")
    axes.axhline(1, color="0.8", zorder=0)
    axes.set(xlabel="angle asked for, radians per step", ylabel="progress made", ylim=(0, 1.1))
    axes.legend(title="rounding", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    rows = []
    for angle in ANGLES:
        for rounding in ROUNDINGS:
            runs = [run(rounding, angle, args.steps, seed) for seed in range(args.seeds)]
            row: dict[str, Any] = {"angle asked": angle, "rounding": rounding}
            for key in ("progress", "angle", "loss"):
                row[key] = statistics.fmean(r[key] for r in runs)
            row["warned"] = sum(r["warned"] for r in runs)
            rows.append(row)
            print(json.dumps(row), flush=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "torch": torch.__version__,
        "steps": args.steps,
        "seeds": args.seeds,
        "command": "python benchmarks/low_precision.py",
    }
    if args.write:
        args.write.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        draw(rows, args.write.with_suffix(".svg"))


if __name__ == "__main__":
    main()
