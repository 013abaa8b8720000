"""What the diagnostics say of small networks, and what training says of the diagnostics.

    python benchmarks/diagnostics.py propagation --write docs/results/propagation.json
    python benchmarks/diagnostics.py attack --write docs/results/attack.json
    python benchmarks/diagnostics.py cost --seeds 9 --write docs/results/propagation_cost.json

``propagation``: 20 convolutions in a row with one normalizer or another; the four statistics at
initialization, and the training loss of the first steps on scikit-learn's digits at the best of
several learning rates. ``attack``: a small network with BatchNorm learns the digits with plain SGD,
whose weights grow, and with SphereSGD, whose weights keep their norms; both are attacked.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import sphereopt as so
from sphereopt.diagnostics import amplification, drawing, fgsm, pgd, propagation

WIDTH, DEPTH, STEPS, BATCH = 16, 20, 80, 64
DEEP_RATES, RATES = (0.03, 0.1), (0.01, 0.03, 0.1, 0.3)
EPS = 0.1
#: Growth of the weights that running averages have not followed, in one example.
STALE = 2
NORMS = {
    "none": nn.Identity,
    "BatchNorm": nn.BatchNorm2d,
    "InstanceNorm (groups of 1)": lambda c: nn.GroupNorm(c, c),
    **{f"GroupNorm, groups of {k}": lambda c, k=k: nn.GroupNorm(c // k, c) for k in (2, 4, 8)},
    "LayerNorm (one group)": lambda c: nn.GroupNorm(1, c),
}
DRAWN = ("none", "BatchNorm", "InstanceNorm (groups of 1)", "GroupNorm, groups of 4",
         "LayerNorm (one group)")  # fmt: skip


def digits():
    """Return training and held-out images (N, 1, 8, 8) in [0, 1] and labels."""
    data = load_digits()
    x = torch.tensor(data.images / 16.0, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1347]], y[order[:1347]], x[order[1347:]], y[order[1347:]]


def deep(norm, seed):
    torch.manual_seed(seed)
    layers = []
    for i in range(DEPTH):
        conv = nn.Conv2d(WIDTH if i else 1, WIDTH, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight)
        layers += [conv, NORMS[norm](WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def batches(x, y, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randint(len(x), (BATCH,), generator=generator)
        yield x[pick], y[pick]


def train(model, optimizer, data, steps, seed):
    """Train; return the loss of every step, infinite after it was not finite."""
    losses = []
    for x, y in batches(*data[:2], steps, seed):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return losses[:-1] + [math.inf] * (steps - len(losses) + 1)
        loss.backward()
        optimizer.step()
    return losses


def at_start(norm, seed, data):
    x, y = next(batches(*data[:2], 1, 100 + seed))
    return propagation(deep(norm, seed), x, loss=lambda out: F.cross_entropy(out, y))


def run_propagation(seeds):
    data, rows = digits(), []
    for norm in NORMS:
        found = [at_start(norm, seed, data) for seed in range(seeds)]
        last = [[x for x in p.layers if x.role == "activation"][-1] for p in found]
        row = {
            "normalizer": norm,
            "variance": statistics.fmean(x.variance for x in last),
            "similarity": statistics.fmean(x.similarity for x in last),
            "stable rank": statistics.fmean(x.stable_rank for x in last),
            "explosion": statistics.geometric_mean(p.explosion for p in found),
        }
        means = {}
        for lr in DEEP_RATES:
            means[lr] = []
            for seed in range(seeds):
                model = deep(norm, seed)
                optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
                losses = train(model, optimizer, data, STEPS, seed)
                # A run that got lost counts as one that learned nothing.
                means[lr].append(statistics.fmean(min(x, math.log(10)) for x in losses))
        row["losses"] = {str(lr): statistics.fmean(x) for lr, x in means.items()}
        row["lr"] = min(means, key=lambda lr: statistics.fmean(means[lr]))
        row["training loss"] = statistics.fmean(means[row["lr"]])
        row["spread"] = statistics.stdev(means[row["lr"]])
        rows.append(row)
        print(json.dumps(row), flush=True)
    normed = [r for r in rows if r["normalizer"] != "none"]
    found = {
        key: correlation([r[key] for r in normed], [r["training loss"] for r in normed])
        for key in ("similarity", "stable rank")
    }
    figure = drawing.draw_propagation({n: at_start(n, 0, data) for n in DRAWN})
    about = {"seeds": seeds, "steps": STEPS, "batch": BATCH, "width": WIDTH, "depth": DEPTH}
    return {"rows": rows, "rank correlation with training loss": found}, about, figure


def correlation(a, b):
    """Return Spearman's rank correlation."""
    ranks = [[sorted(v).index(x) for x in v] for v in (a, b)]
    return statistics.correlation(*ranks)


def small(seed):
    torch.manual_seed(seed)
    layers, width = [], 1
    for c, stride in ((16, 1), (32, 2), (32, 1)):
        layers += [nn.Conv2d(width, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
        width = c
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def optimizer_of(arm, model, lr):
    if arm == "SGD":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    spheres = {f"{i}.weight": "row" for i in (0, 3, 6)}
    return so.SphereSGD(so.param_groups(model, spheres), lr=lr, momentum=0.9)


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def judge(model, data, start):
    """Return what a trained network does to clean and attacked held-out images."""
    x, y = data[2:]
    model.eval()
    weak = fgsm(model, x, y, EPS)
    strong = pgd(model, x, y, EPS, 20, generator=torch.Generator().manual_seed(0))
    found = amplification(model, x, strong - x)
    noise = EPS * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()
    by_noise = amplification(model, x, noise)
    row = {
        "clean": accuracy(model, x, y),
        "FGSM": accuracy(model, weak, y),
        "PGD": accuracy(model, strong, y),
        "norm growth": [r.weight_norm / s for r, s in zip(found.rows, start, strict=True)],
        "stale": [r.stale for r in found.rows],
        "head": model[-1].weight.norm().item(),
    }
    for name, result in (("attack", found), ("noise", by_noise)):
        row[name] = {
            "before": [r.before["running"] for r in result.rows],
            **{f"after, {s}": [r.after[s] for r in result.rows] for s in result.output},
            "output": result.output,
        }
    model.train()
    row["clean, batch statistics"] = accuracy(model, x, y)
    row["PGD, batch statistics"] = accuracy(model, strong, y)
    return row, found


def run_attack(seeds, steps=600):
    data, rows, drawn, models = digits(), [], {}, {}
    for arm in ("SGD", "SphereSGD"):
        for lr in RATES:
            for seed in range(seeds):
                model = small(seed)
                start = [model[i].weight.norm().item() for i in (0, 3, 6)]
                losses = train(model, optimizer_of(arm, model, lr), data, steps, seed)
                state = {k: v.clone() for k, v in model.state_dict().items()}
                row, found = judge(model, data, start)
                model.load_state_dict(state)
                row = {"arm": arm, "lr": lr, "seed": seed, "last loss": losses[-1], **row}
                rows.append(row)
                drawn[arm, lr, seed], models[arm, lr, seed] = found, model
                print(json.dumps({k: row[k] for k in list(row)[:7]}), flush=True)
    best = {}
    for arm in ("SGD", "SphereSGD"):
        best[arm] = max(
            RATES,
            key=lambda lr: statistics.fmean(
                r["clean"] for r in rows if (r["arm"], r["lr"]) == (arm, lr)
            ),
        )
    shown = {f"{arm}, lr {lr}": drawn[arm, lr, 0] for arm, lr in best.items()}
    stale, shown[f"SGD, weights x {STALE}, stale"] = grown(models["SGD", best["SGD"], 0], data)
    figure = drawing.draw_amplification(shown)
    about = {"seeds": seeds, "steps": steps, "batch": BATCH, "eps": EPS}
    return {"best lr": best, "rows": rows, "stale": stale}, about, figure


def grown(model, data):
    """Return the figures of a network whose weights grew and whose running averages did not."""
    convs = [m for m in model if isinstance(m, nn.Conv2d)]
    start = [conv.weight.norm().item() for conv in convs]
    with torch.no_grad():
        for conv in convs:
            conv.weight.mul_(STALE)
    return judge(model, data, start)


def run_cost(repeats):
    """Return processor time of a measurement over that of a forward and backward."""
    data, rows = digits(), []
    for size in (64, 256):
        x, y = data[0][:size], data[1][:size]
        model = deep("BatchNorm", 0)

        def step(model=model, x=x, y=y):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

        def measure(model=model, x=x, y=y):
            propagation(model, x, loss=lambda out: F.cross_entropy(out, y))

        times = {"step": [], "propagation": []}
        for _ in range(repeats):
            for name, what in (("step", step), ("propagation", measure)):
                start = time.process_time()
                what()
                times[name].append(time.process_time() - start)
        best = {name: min(found) for name, found in times.items()}
        rows.append({"batch": size, **best, "ratio": best["propagation"] / best["step"]})
        print(json.dumps(rows[-1]), flush=True)
    about = {"repeats": repeats, "width": WIDTH, "depth": DEPTH, "unit": "s, processor time"}
    return {"rows": rows}, about, None


def write(path, results, about, figure):
    import matplotlib as mpl

    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU, 1 thread",
        "torch": torch.__version__,
        **about,
    }
    path.write_text(json.dumps({"about": about, **results}, indent=1) + "\n")
    if figure is None:
        return
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("propagation", "attack", "cost"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = {"propagation": run_propagation, "attack": run_attack, "cost": run_cost}[args.what]
    results, about, figure = run(args.seeds)
    about["command"] = f"python benchmarks/diagnostics.py {args.what}"
    if args.write:
        write(args.write, results, about, figure)


if __name__ == "__main__":
    main()
