"""Every formula of ``sphereopt.theory`` against random walks of real optimizers.

    python benchmarks/theory_simulation.py --write docs/results/theory_simulation.json
    python benchmarks/theory_simulation.py --draw docs/results/theory_simulation.json

The first runs everything (some ten minutes on one core), writes the results and the pictures
``theory-*.svg`` beside them, and the tables into ``docs/theory/``; the second only draws and
writes tables. Results: for every optimizer the errors of norm and angle at equilibrium, and along
runs with warm-up and cosine from 0.3 and 3 times the equilibrium norm; and what formulas that are
often quoted would have said (``theory_off.py``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from random_walk import CASE, CASES, TRAVELLED, Case, RandomWalk, smooth  # noqa: E402
from theory_off import OFF_MARKS, measured_claims, off_table  # noqa: E402

from sphereopt.theory import equilibrium, schedule, trajectory  # noqa: E402

STARTS = (0.3, 3.0)
WINDOW = 20
MARKS = "<!-- table -->", "<!-- end of table -->"


def rms(x: np.ndarray) -> float:
    return math.sqrt(np.mean(x**2))


def at_equilibrium(case: Case) -> dict[str, Any]:
    """Return how far norm and angle are from what is predicted, long after the start."""
    expected = equilibrium(case.optimizer, lr=case.lr, weight_decay=case.weight_decay, **case.sized)
    blocks = 16 if case.optimizer == "muon" else 256
    lag = 2500 if case.hyper.get("betas") == (0.9, 0.999) else 0
    wait, count = int(lag + 6 * expected.relaxation), int(max(400, 6 * expected.relaxation))
    walk = RandomWalk(case, [1.1 * expected.norm], blocks=blocks, seed=1)
    walk.run([case.lr] * wait)
    found = walk.run([case.lr] * count)
    return {
        "case": case.label,
        "lr": case.lr,
        "weight_decay": case.weight_decay,
        "options": dict(case.hyper),
        "norm": expected.norm,
        "angle": expected.angle,
        "K": expected.K,
        "norm error": expected.norm / rms(found.norm) - 1,
        "angle error": expected.angle / rms(found.angle) - 1,
    }


def travelled(case: Case) -> list[dict[str, Any]]:
    """Return the errors along a run with warm-up and cosine, from both starts."""
    settled = equilibrium(case.optimizer, lr=case.lr, weight_decay=case.weight_decay, **case.sized)
    rates = schedule("cosine", case.lr, case.steps, warmup=case.steps // 10, final=0.05)
    norms = [start * settled.norm for start in STARTS]
    blocks = 24 if case.optimizer == "muon" else 1024
    found = RandomWalk(case, norms, blocks=blocks, seed=1).run(rates)
    rows = []
    for i, start in enumerate(STARTS):
        run = trajectory(
            case.optimizer, lr=rates, weight_decay=case.weight_decay, norm0=norms[i], **case.sized
        )
        angle = smooth(found.angle[:, i], WINDOW)
        off = {
            "norm": np.abs(run.norm / found.norm[:, i] - 1),
            "angle": np.abs(smooth(run.angle, WINDOW) / angle - 1),
        }
        # For the pictures: the angle in the middle of its window.
        at = np.linspace(WINDOW // 2, case.steps - WINDOW // 2 - 1, 28).astype(int)
        rows.append(
            {
                "case": case.label,
                "start": start,
                "lr": case.lr,
                "weight_decay": case.weight_decay,
                "memories": run.memories,
                **{f"worst {name}": float(x.max()) for name, x in off.items()},
                **{f"mean {name}": float(x.mean()) for name, x in off.items()},
                "steps": at.tolist(),
                "norms": found.norm[at, i].tolist(),
                "angles": angle[at - WINDOW // 2].tolist(),
            }
        )
    return rows


def annealed(memories: int) -> dict[str, Any]:
    """Return the angles of AdamW under a cosine to zero that lasts some memories."""
    case = CASE["adamw (0.9, 0.95)"]
    count = int(2 * memories / (case.lr * case.weight_decay))
    norm = equilibrium("adamw", lr=case.lr, weight_decay=case.weight_decay, **case.sized).norm
    rates = schedule("cosine", case.lr, count, warmup=count // 20)
    angle = smooth(RandomWalk(case, [norm], blocks=256, seed=1).run(rates).angle[:, 0], WINDOW)
    at = np.linspace(WINDOW // 2, 0.99 * count - WINDOW, 34).astype(int)
    seen = angle[at - WINDOW // 2].tolist()
    return {
        "memories": memories,
        "count": count,
        "norm0": norm,
        "steps": at.tolist(),
        "angles": seen,
    }


def table(results: dict[str, Any]) -> str:
    """Return the errors of every optimizer as a Markdown table."""
    head = (
        "| optimizer | equilibrium: norm | angle | K | from 0.3: norm, worst (mean) "
        "| angle, worst (mean) | from 3: norm | angle |\n|---|---|---|---|---|---|---|---|\n"
    )
    runs = {(row["case"], row["start"]): row for row in results["trajectories"]}
    lines = []
    for row in results["equilibrium"]:
        cells = [row["case"], f"{row['norm error']:+.2%}", f"{row['angle error']:+.2%}"]
        cells.append(f"{row['K']:.3g}")
        for start in STARTS:
            run = runs[row["case"], start]
            cells += [
                f"{run[f'worst {x}']:.2%} ({run[f'mean {x}']:.2%})" for x in ("norm", "angle")
            ]
        lines.append(f"| {' | '.join(cells)} |".replace("%", " %"))
    return head + "\n".join(lines)


def between(text: str, marks: tuple[str, str], new: str) -> str:
    """Return a page with what is between two marks replaced."""
    head, _, rest = text.partition(marks[0])
    return f"{head}{marks[0]}\n\n{new}\n\n{marks[1]}{rest.partition(marks[1])[2]}"


def publish(results: dict[str, Any], path: Path) -> None:
    """Write tables into the pages and pictures beside the results."""
    from theory_figures import draw

    for name, marks, text in (
        ("random_walk.md", MARKS, table(results)),
        ("off.md", OFF_MARKS, off_table(results["off"])),
    ):
        page = ROOT / "docs" / "theory" / name
        page.write_text(between(page.read_text(), marks, text))
    draw(results, path.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--draw", type=Path)
    args = parser.parse_args()
    if args.draw:
        publish(json.loads(args.draw.read_text()), args.draw)
        return
    torch.set_num_threads(1)
    began = time.time()
    results: dict[str, Any] = {"equilibrium": [], "trajectories": []}
    for case, moving in zip(CASES, TRAVELLED, strict=True):
        results["equilibrium"].append(at_equilibrium(case))
        results["trajectories"] += travelled(moving)
        print(json.dumps(results["equilibrium"][-1]), flush=True)
    results["schedules"] = [annealed(memories) for memories in (3, 30)]
    results["off"] = measured_claims()
    results["about"] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "minutes": round((time.time() - began) / 60, 1),
        "command": "python benchmarks/theory_simulation.py",
        "errors": "predicted over measured, less 1",
        "window": f"angles are root mean squares of {WINDOW} steps",
    }
    if args.write:
        args.write.write_text(json.dumps(results, indent=1) + "\n")
        publish(results, args.write)


if __name__ == "__main__":
    main()
