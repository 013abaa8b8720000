"""Compare optimizers on a small GPT, and AdamW with its copy on spheres of free radius.

    python benchmarks/gpt_optimizers.py --write docs/results/train_gpt.json

Runs ``examples/train_gpt.py`` about fifty times, some ten seconds each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
LRS = (3e-3, 1e-2, 3e-2, 1e-1)
#: All matrices of the blocks are on proved spheres: nothing is held by choice.
COMPARED = {"sandwich_norm": True}
#: Name to colour and marker; the colours are Okabe and Ito's.
ARMS = {
    "AdamW": ("#0072b2", "o"),
    "SphereAdam": ("#56b4e9", "s"),
    "AdamH": ("#009e73", "^"),
    "Muon": ("#d55e00", "D"),
    "SphereMuon": ("#e69f00", "v"),
    "MuonH": ("#cc79a7", "x"),
}
#: Distances from AdamW on one thread: colour, line, label.
GAPS = {
    "threads": ("#d55e00", "--", "AdamW on two threads"),
    "free": ("#0072b2", "-", "SphereAdam, free radius"),
    "clipped": ("#999999", ":", "the same, both with clipping"),
}


def drop_in(run: Any, seeds: int) -> list[dict[str, Any]]:
    """Return loss curves of AdamW, of AdamW on two threads, and of SphereAdam of free radius."""
    rows = []
    for seed in range(seeds):
        options = {"seed": seed, "lr": 3e-3, "weight_decay": 0.1, "progress": False}
        row: dict[str, Any] = {"seed": seed}
        for clip in (0.0, 1.0) if seed == 0 else (0.0,):
            plain = run(optimizer="AdamW", clip=clip, **options)
            free = run(optimizer="SphereAdam", radius="free", clip=clip, **options)
            row["clipped" if clip else "free"] = gap(plain, free)
            if not clip:
                torch.set_num_threads(2)
                row["threads"] = gap(plain, run(optimizer="AdamW", clip=clip, **options))
                torch.set_num_threads(1)
                row |= {"weights": free["weights"], "valid_loss": plain["valid_loss"]}
        print(json.dumps({n: row[n]["largest"] for n in GAPS if n in row}), flush=True)
        rows.append(row)
    return rows


def gap(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return how far two loss curves are apart: at every step, at most, on average, validated."""
    gaps = [abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True)]
    valid = abs(one["valid_loss"] - other["valid_loss"])
    return {"gaps": gaps, "largest": max(gaps), "mean": statistics.fmean(gaps), "valid": valid}


def compare(run: Any, seeds: int) -> list[dict[str, Any]]:
    """Return one row per optimizer: validation loss at every lr, and at the best with all seeds."""
    rows = []
    for name in ARMS:
        options = {"optimizer": name, "progress": False} | COMPARED
        cells = [(lr, attempt(run, lr=lr, seed=0, **options)) for lr in LRS]
        best, first = min(cells, key=lambda cell: cell[1]["valid_loss"])
        found = [first, *(attempt(run, lr=best, seed=s, **options) for s in range(1, seeds))]
        losses = [r["valid_loss"] for r in found]
        row = {"optimizer": name, "lr": best, "edge": best in (LRS[0], LRS[-1])}
        row["cells"] = [[lr, r["valid_loss"]] for lr, r in cells]
        row["losses"], row["mean"] = losses, statistics.fmean(losses)
        row["interval"] = interval(losses)
        row["train"] = statistics.fmean(r["train_loss"] for r in found)
        row["seconds"] = statistics.median(r["seconds"] for r in found)
        row["weights"] = first["weights"]
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def attempt(run: Any, **options: Any) -> dict[str, Any]:
    """Run; a loss that is not finite counts as infinite."""
    try:
        return run(**options)
    except RuntimeError as error:
        if "finite" not in str(error):
            raise
        return {"valid_loss": math.inf}


def interval(values: list[float]) -> float:
    """Return half of Student's 95 % interval of the mean; of three values."""
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}[len(values)]
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw gaps of loss curves, and validation loss against lr."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in data["drop_in"]["rows"]:
        for name, (colour, style, label) in GAPS.items():
            if name not in row:
                continue
            gaps = [step or math.nan for step in row[name]["gaps"]]  # 0 has no logarithm
            label = label if row["seed"] == 0 else None
            left.semilogy(gaps, style, color=colour, linewidth=0.8, label=label)
    left.set(xlabel="step", ylabel="loss, distance from AdamW on one", title="The copy")
    for row in data["compared"]["rows"]:
        colour, marker = ARMS[row["optimizer"]]
        lrs, losses = zip(*row["cells"], strict=True)
        label = row["optimizer"]
        right.semilogx(
            lrs, losses, color=colour, marker=marker, label=label, markerfacecolor="none"
        )
    right.set(xlabel="lr", ylabel="validation loss", title="The grid")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gpt"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, help="one of the two; by default both")
    parser.add_argument("--write", type=Path, help="the JSON; a part that is not run stays in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "examples"))
    from train_gpt import run

    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seeds": args.seeds,
        "command": "python benchmarks/gpt_optimizers.py",
    }
    data = json.loads(args.write.read_text()) if args.write and args.write.exists() else {}
    for part in [args.part] if args.part else PARTS:
        data[part] = {"about": about, "rows": PARTS[part](run, args.seeds)}
        if args.write:
            args.write.write_text(json.dumps(data) + "\n")
    if args.write and len(data) == len(PARTS):
        draw(data, args.write.with_suffix(".svg"))


PARTS = {"compared": compare, "drop_in": drop_in}

if __name__ == "__main__":
    main()
