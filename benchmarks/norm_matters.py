"""Weight decay before a BatchNorm: the arms of the example, over seeds, with intervals.

    python benchmarks/norm_matters.py --write docs/results/norm_matters_weight_decay.json --set \
        data='"cifar10-jpeg.npz"' steps=10000 lr=0.1 memories=16 shift=2 train_images=50000 \
        valid_images=5000

Hours long, so each run is written as it ends, and what the file has already is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import norm_matters_weight_decay as example

HEAD = """| arm | before the first drop | end | minus decay | loss, held out | training loss |
|---|---|---|---|---|---|"""
Runs = list[dict[str, Any]]


def interval(values: Sequence[float], scale: float = 100.0) -> str:
    """Return mean and half-width of Student's 95 % interval."""
    text = f"{scale * statistics.fmean(values):.2f}"
    if len(values) < 2:
        return text
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{text} ± {scale * half:.2f}"


def line(runs: Runs, arm: str) -> str:
    """Return an arm's line of the table; differences are paired by seed."""
    own = [r for r in runs if r["arm"] == arm]
    base = {r["seed"]: r["valid_accuracy"] for r in runs if r["arm"] == "decay"}
    apart = [r["valid_accuracy"] - base[r["seed"]] for r in own if arm != "decay"]
    columns = [interval([r[key] for r in own]) for key in ("before_drop", "valid_accuracy")]
    losses = [interval([r[key] for r in own], 1.0) for key in ("valid_loss", "train_loss")]
    cells = [arm, *columns, interval(apart) if apart else "", *losses]
    return f"| {' | '.join(cells)} |".replace("-", "−")


def former(path: Path | None, knobs: dict[str, Any]) -> Runs:
    """Return the runs that the file has; it must be of the same knobs."""
    if path is None or not path.exists():
        return []
    o = example.Options(**knobs)
    wanted = asdict(o) | {"weight_decay": o.decay, "data": Path(o.data).name}
    runs: Runs = json.loads(path.read_text())["runs"]
    if any(r[key] != value for r in runs for key, value in wanted.items()):
        raise SystemExit(f"{path} has runs of other knobs; write to another file")
    return runs


def measure(runs: Runs, seeds: int, path: Path | None, knobs: dict[str, Any]) -> None:
    """Add what is missing to the runs, and write them after each."""
    done = {(r["arm"], r["seed"]) for r in runs}
    for seed in range(seeds):
        norms = None
        for arm in example.ARMS:
            if (arm, seed) in done:
                continue
            # Without norms, those of "decay" are recorded by a run of it.
            found = example.run(**knobs, arm=arm, seed=seed, norms=norms, progress=False)
            norms = found["norms"] if arm == "decay" else norms
            # Not where the data lie on this machine.
            kept = found | {"data": Path(found["data"]).name}
            runs.append({key: value for key, value in kept.items() if key != "norms"})
            write(runs, path)


def write(runs: Runs, path: Path | None) -> None:
    if path is None:
        return
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    path.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=JSON", help="knobs of run()")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    knobs = {key: json.loads(value) for key, value in (k.split("=", 1) for k in args.set)}
    runs = former(args.write, knobs)
    measure(runs, args.seeds, args.write, knobs)
    print(HEAD)
    for arm in example.ARMS:
        print(line(runs, arm))
    if args.write:
        example.draw(runs, args.write.with_suffix(".svg"))


if __name__ == "__main__":
    main()
