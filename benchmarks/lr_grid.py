r"""A first honest table: each optimizer at the best of a small grid, and at its default.

    python benchmarks/lr_grid.py image --write docs/results/train_image_grid.json --set \
        data='"fashion-mnist"' net='"vgg11"' width=0.125 images=6000 augment=false
    python benchmarks/lr_grid.py gpt --write docs/results/train_gpt_grid.json --set \
        sandwich_norm=true

Runs the example of the task. The grid is searched with one seed; the best cell is run again with
further seeds, and so is each of our optimizers without any learning rate. Means over seeds are what
the table shows. A best value at the edge of its grid is marked: the grid was too small there. What
the file has of optimizers that are not run stays in it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
Run = Callable[..., dict[str, Any]]


class Grid(NamedTuple):
    """Learning rates, weight decays where the optimizer has one, and other knobs of the cells."""

    lrs: tuple[float, ...]
    decays: tuple[float, ...] = (0.0,)
    knobs: tuple[tuple[str, Any], ...] = ()


RADIANS = Grid((3e-3, 1e-2, 3e-2, 0.1))
#: Lion's own rate, for what is on no sphere: an angle would be far too long a step there.
LION = Grid((1e-2, 3e-2, 0.1, 0.3), knobs=(("ordinary_lr", 1e-3),))


GRIDS: dict[str, dict[str, Grid]] = {
    "image": {
        "SGD": Grid((0.01, 0.03, 0.1, 0.3), (0.0, 5e-4, 5e-3)),
        "AdamW": Grid((1e-3, 3e-3, 1e-2, 3e-2), (0.0, 0.01, 0.1)),
        "SphereSGD": Grid((0.01, 0.03, 0.1, 0.3)),
        "SphereAdam": RADIANS,
        "SphereLion": LION,
        "SphereMuon": RADIANS,
    },
    "gpt": {
        "SGD": Grid((0.1, 0.3, 1.0, 3.0), (0.0, 5e-4)),
        "AdamW": Grid((3e-3, 1e-2, 3e-2, 0.1), (0.0, 0.1)),
        "SphereSGD": Grid((0.1, 0.3, 1.0, 3.0)),
        "SphereAdam": RADIANS,
        "SphereLion": LION,
        "SphereMuon": RADIANS,
    },
}


def finite(result: dict[str, Any]) -> float:
    """Return the validation loss; infinity where a run did not end in a number."""
    loss = result["valid_loss"]
    return loss if math.isfinite(loss) else math.inf


def attempt(run: Run, **options: Any) -> dict[str, Any]:
    """Run once; a diverged run counts as an infinite loss, any other error stops the search."""
    try:
        return run(progress=False, **options)
    except (FloatingPointError, RuntimeError) as error:
        if "finite" not in str(error) and "diverged" not in str(error):
            raise
        return {"valid_loss": math.inf, "valid_accuracy": 0.0}


def search(run: Run, grid: Grid, **options: Any) -> Iterator[dict[str, Any]]:
    """Yield one row per cell: lr, weight_decay, valid_loss, of one seed."""
    options |= dict(grid.knobs)
    for lr, decay in itertools.product(grid.lrs, grid.decays):
        result = attempt(run, lr=lr, weight_decay=decay, seed=0, **options)
        yield {"lr": lr, "weight_decay": decay, "valid_loss": finite(result)}


def repeated(run: Run, seeds: int, **options: Any) -> dict[str, Any]:
    """Return mean and standard deviation of loss and accuracy over seeds."""
    results = [attempt(run, seed=seed, **options) for seed in range(seeds)]
    losses = [finite(r) for r in results]
    return {
        "lr": results[0].get("lr"),
        "weight_decay": options.get("weight_decay"),
        "loss": statistics.mean(losses),
        "loss_std": statistics.stdev(losses) if seeds > 1 else 0.0,
        "accuracy": statistics.mean(r["valid_accuracy"] for r in results),
    }


def compare(run: Run, grids: dict[str, Grid], seeds: int, **options: Any) -> dict[str, Any]:
    """Return per optimizer: the cells, the best of them and the default, repeated."""
    rows = {}
    for name, grid in grids.items():
        cells = list(search(run, grid, optimizer=name, **options))
        best = min(cells, key=lambda cell: cell["valid_loss"])
        chosen = {"lr": best["lr"], "weight_decay": best["weight_decay"], **dict(grid.knobs)}
        rows[name] = {
            "cells": cells,
            "best": repeated(run, seeds, optimizer=name, **chosen, **options),
            "edge": best["lr"] in (grid.lrs[0], grid.lrs[-1]),
        }
        if name.startswith("Sphere"):
            rows[name]["default"] = repeated(run, seeds, optimizer=name, **options)
        print(line(name, rows[name]), flush=True)
    return rows


def line(name: str, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    best, default = row["best"], row.get("default")
    lr = f"{best['lr']:g}{' (edge)' if row['edge'] else ''}"
    cells = [name, lr, f"{best['weight_decay']:g}", loss(best)]
    cells += [f"{best['accuracy']:.1%}"]
    cells += ["" if default is None else without_lr(default, best)]
    return f"| {' | '.join(cells)} |"


def without_lr(default: dict[str, Any], best: dict[str, Any]) -> str:
    return f"{loss(default)} ({default['loss'] / best['loss'] - 1:+.1%})"


def loss(row: dict[str, Any]) -> str:
    spread = f" ± {row['loss_std']:.3f}" if row["loss_std"] else ""  # none of one seed
    return f"{row['loss']:.3f}{spread}"


HEAD = """| optimizer | lr | weight decay | validation loss | accuracy | loss if no lr is given |
|---|---|---|---|---|---|"""


def former(path: Path | None, command: str) -> dict[str, Any]:
    """Return the rows that the file has; they must be of the same command."""
    if path is None or not path.exists():
        return {}
    data = json.loads(path.read_text())
    if data["about"]["command"] != command:
        raise SystemExit(f"{path} has results of {data['about']['command']}; name another")
    rows: dict[str, Any] = data["results"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=GRIDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="optimizers; all by default")
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=JSON", help="knobs of run()")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    run = importlib.import_module(f"train_{args.task}").run
    options = {key: json.loads(value) for key, value in (k.split("=", 1) for k in args.set)}
    grids = {k: v for k, v in GRIDS[args.task].items() if not args.only or k in args.only}
    options_shown = options | ({"data": Path(options["data"]).name} if "data" in options else {})
    shown = [f"{key}={json.dumps(value)}" for key, value in options_shown.items()]
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU, one thread",
        "torch": torch.__version__,
        "seeds": args.seeds,
        "options": options_shown,
        "command": f"python benchmarks/lr_grid.py {args.task} --set {' '.join(shown)}",
    }
    rows = former(args.write, about["command"])
    print(HEAD)
    rows |= compare(run, grids, args.seeds, **options)
    if args.write:
        args.write.write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
