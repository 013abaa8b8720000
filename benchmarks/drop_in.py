"""Does radius="free" follow torch in float32? The difference beside that of another thread count.

    OMP_WAIT_POLICY=passive python benchmarks/drop_in.py --write docs/results/train_image.json

Runs examples/train_image.py. A run is compared with torch's of the same seed, loss by loss: (a)
torch with 2 threads in place of 1, which only rounds differently; (b) ours with radius="free";
(c) torch with 1 % more lr, to see how a real change of the optimizer looks. Once with the eps of
BatchNorm as torch has it, and once with next to none: weights are scale-invariant but for eps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from train_image import run

FAMILIES = {"SGD": ("SphereSGD", 0.1), "AdamW": ("SphereAdam", 3e-3)}
EPS = (1e-5, 1e-12)
ARMS = ("2 threads", "free", "lr + 1 %")
#: Two curves have parted when they differ by so much, in nats.
PARTED = 1e-3
LABELS = {
    "2 threads": "torch with 2 threads",
    "free": 'ours, radius="free"',
    "lr + 1 %": "torch with 1 % more lr",
}
COLOURS = dict(zip(ARMS, ("0.45", "#d55e00", "#0072b2"), strict=True))


def runs(family: str, seed: int, **knobs: Any) -> dict[str, dict[str, Any]]:
    """Return the results of torch and of the three arms."""
    ours, lr = FAMILIES[family]
    knobs |= {"seed": seed, "progress": False}
    torch.set_num_threads(1)
    found = {
        "torch": run(optimizer=family, lr=lr, **knobs),
        "free": run(optimizer=ours, radius="free", lr=lr, **knobs),
        "lr + 1 %": run(optimizer=family, lr=1.01 * lr, **knobs),
    }
    torch.set_num_threads(2)
    found["2 threads"] = run(optimizer=family, lr=lr, **knobs)
    torch.set_num_threads(1)
    return found


def row(
    family: str, eps: float, seed: int, arm: str, found: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return how far an arm is from torch."""
    pairs = zip(found[arm]["losses"], found["torch"]["losses"], strict=True)
    gaps = [abs(a - b) for a, b in pairs]
    parted = next((i for i, gap in enumerate(gaps, 1) if gap > PARTED), len(gaps))
    return {
        "family": family,
        "eps": eps,
        "seed": seed,
        "arm": arm,
        "parted": parted,
        "mean": statistics.fmean(gaps),
        "last tenth": statistics.fmean(gaps[-len(gaps) // 10 :]),
        "valid_loss": found[arm]["valid_loss"],
        "valid_accuracy": found[arm]["valid_accuracy"],
        "torch's valid_loss": found["torch"]["valid_loss"],
        "torch's valid_accuracy": found["torch"]["valid_accuracy"],
        "gaps": [float(f"{gap:.2e}") for gap in gaps],
    }


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table: means over the seeds, with the standard deviation where it says so."""
    table = [
        "| from | eps | run | parts at step | mean difference | in the last tenth | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, eps in product(FAMILIES, EPS):
        mine = [r for r in rows if (r["family"], r["eps"]) == (family, eps)]
        cells = ["itself", "–", "0", "0", accuracy(mine, "torch's valid_accuracy")]
        table.append(f"| {family} | {eps:g} | {' | '.join(cells)} |")
        for arm in ARMS:
            runs = [r for r in mine if r["arm"] == arm]
            parted = " ".join(str(r["parted"]) for r in runs)
            gaps = [f"{statistics.fmean(r[x] for r in runs):.4f}" for x in ("mean", "last tenth")]
            name = f'{FAMILIES[family][0]}, `radius="free"`' if arm == "free" else arm
            cells = [name, parted, *gaps, accuracy(runs, "valid_accuracy")]
            table.append(f"| {family} | {eps:g} | {' | '.join(cells)} |")
    return table


def accuracy(rows: list[dict[str, Any]], key: str) -> str:
    shares = sorted({r["seed"]: r[key] for r in rows}.values())
    mean, spread = statistics.fmean(shares), statistics.stdev(shares) if shares[1:] else 0.0
    return f"{100 * mean:.1f} ± {100 * spread:.1f} %"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the differences, the median over the seeds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "drop-in"}
    figure, axes = pyplot.subplots(2, 2, figsize=(8, 5.4), layout="constrained", sharey=True)
    for panel, (eps, family) in zip(axes.flat, product(EPS, FAMILIES), strict=True):
        for arm, colour in COLOURS.items():
            asked = (family, eps, arm)
            mine = [r["gaps"] for r in rows if (r["family"], r["eps"], r["arm"]) == asked]
            middle = [max(statistics.median(gaps), 1e-8) for gaps in zip(*mine, strict=True)]
            panel.loglog(range(1, len(middle) + 1), middle, color=colour, lw=1, label=LABELS[arm])
        panel.set(title=f"{family}, eps {eps:g}")
    for panel in axes[1]:
        panel.set_xlabel("step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=3, loc="outside upper center")
    figure.supylabel("difference of the loss from torch's, nats")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    begin, rows = time.perf_counter(), []
    for family, eps, seed in product(FAMILIES, EPS, range(args.seeds)):
        found = runs(family, seed, norm_eps=eps, steps=args.steps, width=args.width)
        rows += [row(family, eps, seed, arm, found) for arm in ARMS]
        for r in rows[-len(ARMS) :]:
            print({key: value for key, value in r.items() if key != "gaps"}, flush=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} shared cores, CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "data": "digits (scikit-learn), 1,438 + 359 images",
        "net": f"resnet20, width {args.width:g}, BatchNorm",
        "steps": args.steps,
        "seeds": args.seeds,
        "lr": {family: lr for family, (_, lr) in FAMILIES.items()},
        "seconds": round(time.perf_counter() - begin),
        "command": "OMP_WAIT_POLICY=passive python benchmarks/drop_in.py --write "
        "docs/results/train_image.json",
    }
    if args.write:
        args.write.write_text(json.dumps({"about": about, "rows": rows}) + "\n")
        draw(rows, args.write.with_suffix(".svg"))
    print(*lines(rows), sep="\n")


if __name__ == "__main__":
    main()
