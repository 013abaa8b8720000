"""Norm and angle at equilibrium, predicted and measured, under SGD, AdamW, Lion and Muon.

    python examples/equilibrium.py [--out runs/equilibrium]

A network with two normalized matrices learns images. The matrices are trained by the optimizer in
question, all else by plain SGD. The calculator (sphereopt.theory) is given the optimizer's options,
and of the run the norms before the first step and the size of the gradients, nothing else; the
tracker measures. Needs pip install "sphereopt[examples,report]".
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from rich import progress as bars
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sphereopt as so
from sphereopt.train import DivergedError, OptionError, fresh_folder, load

#: Optimizer, its name in the calculator, lr, weight decay, the rest. lr * weight_decay is such that
#: all forget a direction in about 1000 steps (SGD: divided by 1 - momentum).
Kind = tuple[Callable[..., torch.optim.Optimizer], str, float, float, dict[str, Any]]
OPTIMIZERS: dict[str, Kind] = {
    "SGD": (torch.optim.SGD, "sgd", 0.1, 1e-3, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, "adamw", 4.5e-3, 0.22, {"betas": (0.9, 0.95)}),
    # torch has no Lion; with radius="free" ours follows the authors'.
    "Lion": (so.SphereLion, "lion", 6.6e-4, 1.5, {"betas": (0.9, 0.99)}),
    "Muon": (torch.optim.Muon, "muon", 4.5e-3, 0.22, {"adjust_lr_fn": "match_rms_adamw"}),
}
STEPS = 6000
BATCH, WIDTH = 16, 32
#: Share of labels that are wrong. Without noise there is no random walk, and no equilibrium.
WRONG = 0.3
REST_LR = 0.03  # of plain SGD, for the gains and the head
ROWS = 400  # of the log
CHECK_EVERY = 100  # steps between looks at the loss: each makes the host wait for the device
FILES = ("run.jsonl", "results.json", "report.html")
COLOURS = ("#0072b2", "#d55e00")  # Okabe and Ito's: one per matrix


def network(pixels: int, classes: int) -> nn.Sequential:
    """Return two normalized layers and a head; each weight before a LayerNorm is one sphere."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (pixels, WIDTH):
        layers += [nn.Linear(before, WIDTH, bias=False), nn.LayerNorm(WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, classes))


def images(data: str, device: str) -> tuple:
    """Return training and held-out images with labels on the device, normalized, and classes."""
    found = load(data)
    parts = (
        (found.train_images, found.train_labels),
        (found.test_images, found.test_labels),
    )
    ready = [(found.normalized(x, torch.float32).to(device), y.to(device)) for x, y in parts]
    return *ready, found.classes


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Return loss and accuracy on images held out."""
    outputs = model(x)
    right = (outputs.argmax(1) == y).float().mean()
    return {"valid_loss": cross_entropy(outputs, y).item(), "valid_accuracy": right.item()}


def batches(x: Tensor, y: Tensor, classes: int, steps: int, seed: int) -> Iterator[tuple]:
    """Yield random images, part of them with a random label."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randint(len(x), (BATCH,), generator=draw).to(x.device)
        wrong = torch.randint(classes, (BATCH,), generator=draw).to(x.device)
        noisy = (torch.rand(BATCH, generator=draw) < WRONG).to(x.device)
        yield x[pick], torch.where(noisy, wrong, y[pick])


def build(name: str, model: nn.Module, x: Tensor, lr: float, weight_decay: float) -> tuple:
    """Return the optimizer of what is scale-invariant, and one of all else."""
    make, _, _, _, options = OPTIMIZERS[name]
    groups = so.param_groups(model, so.find_spheres(model, x[:64]))
    spheres = [group for group in groups if group["sphere"]]
    rest = [p for group in groups if not group["sphere"] for _, p in group["params"]]
    if make is so.SphereLion:
        options = {**options, "radius": "free"}
    optimizer = make(spheres, lr=lr, weight_decay=weight_decay, **options)
    return optimizer, torch.optim.SGD(rest, REST_LR)


def predicted(name: str, shape: torch.Size, log: dict[str, Any], lr: float, wd: float) -> dict:
    """Return what the calculator says: norm and angle of every step, and where they settle."""
    _, rule, _, _, options = OPTIMIZERS[name]
    known = {"dim": shape.numel(), **options} | ({"shape": tuple(shape)} if rule == "muon" else {})
    steps, size = log["steps"], log["gradient"]
    # A norm follows the mean square of many gradients, not that of one batch.
    kernel = np.ones(9) / 9
    smooth = np.sqrt(np.convolve(np.pad(size**2, 4, mode="edge"), kernel, "valid"))
    each = np.interp(np.arange(1, steps[-1] + 1), steps, smooth)
    run = so.theory.trajectory(
        rule, lr=lr, weight_decay=wd, norm0=log["start"], grad_norm=each, **known
    )
    late = math.sqrt(np.mean(size[len(size) // 2 :] ** 2))
    settled = so.theory.equilibrium(rule, lr=lr, weight_decay=wd, grad_norm=late, **known)
    lines = {"norm": run.norm[steps - 1], "angle": run.angle[steps - 1]}
    return {"lines": lines, "norm": settled.norm, "angle": settled.angle}


def compare(name: str, model: nn.Module, rows: list, start: dict, lr: float, wd: float) -> dict:
    """Return measured and predicted norm and angle of every matrix, and predicted / measured."""
    history, found = so.report.History.from_rows(rows), {}
    for index, weight in enumerate(history.names):
        log = {key: history.of(key)[:, index] for key in ("norm", "angle")}
        gradient = history.of("scaled_grad_norm")[:, index]
        seen = {"steps": history.steps, "start": start[weight], "gradient": gradient}
        says = predicted(name, model.get_parameter(weight).shape, seen, lr, wd)
        entry: dict[str, Any] = {"steps": history.steps.tolist()}
        for key, measured in log.items():
            late = math.sqrt(np.mean(measured[len(measured) // 2 :] ** 2))
            entry[key] = {
                "measured": late,
                "predicted": says[key],
                "ratio": says[key] / late,
                "measured line": measured.tolist(),
                "predicted line": says["lines"][key].tolist(),
            }
        found[weight] = entry
    return found


def checked(optimizer: str, device: str, steps: int, **positive: float) -> None:
    if optimizer not in OPTIMIZERS:
        raise OptionError("optimizer", optimizer, f"use one of {', '.join(OPTIMIZERS)}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise OptionError("device", device, "torch finds no such device here; use cpu")
    if steps < 20:
        raise OptionError("steps", steps, "must be 20 or more: half of them are averaged")
    for name, value in positive.items():
        if not 0 < value <= 1e38:  # float32 ends there
            raise OptionError(name, value, "must be a positive number")


def train(model, source, optimizer, rest, tracker, losses: Tensor) -> None:
    """Run the plain loop; fill in the losses."""
    for step, (x, y) in enumerate(source, 1):
        model.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        tracker.log(loss=loss)
        optimizer.step()
        rest.step()
        losses[step - 1] = loss.detach()
        if step % CHECK_EVERY == 0 or step == len(losses):  # the only waits for the device
            for bad in (~losses.isfinite()).nonzero().flatten().tolist():
                raise DivergedError(
                    f"the loss is {losses[bad]} at step {bad + 1}; use a smaller lr"
                )


def run(
    *,
    data: str = "digits",
    device: str = "cpu",
    seed: int = 0,
    steps: int = STEPS,
    optimizer: str = "SGD",
    lr: float | None = None,
    weight_decay: float | None = None,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train once and compare; lr and weight_decay None: those of OPTIMIZERS.

    Returns train_loss (mean of the last tenth of the steps, noisy labels included), valid_loss,
    valid_accuracy, seconds, steps, lr, weight_decay, and matrices: name to norm and angle, measured
    (root mean square over the second half of the run) and predicted, and their lines.
    """
    kind = OPTIMIZERS.get(optimizer, OPTIMIZERS["SGD"])
    lr = kind[2] if lr is None else lr
    weight_decay = kind[3] if weight_decay is None else weight_decay
    checked(optimizer, device, steps, lr=lr, weight_decay=weight_decay)
    (x, y), held_out, classes = images(data, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(x[0].numel(), classes).to(device)
    optimized, rest = build(optimizer, model, x, lr, weight_decay)
    start = {name: p.detach().norm().item() for name, p in model.named_parameters()}
    rows: list[dict[str, Any]] = []
    sinks: list[Any] = [rows.append]
    if out is not None:
        sinks.append(fresh_folder(out, FILES) / "run.jsonl")
    begin = time.perf_counter()
    with so.track(optimized, sinks, every=max(1, steps // ROWS)) as tracker:
        source = batches(x, y, classes, steps, seed)
        if progress and sys.stderr.isatty():
            source = bars.track(source, optimizer, steps, console=Console(stderr=True))
        losses = torch.zeros(steps, device=device)
        train(model, source, optimized, rest, tracker, losses)
    found = {
        "optimizer": optimizer,
        "seed": seed,
        "lr": lr,
        "weight_decay": weight_decay,
        "steps": steps,
        "seconds": time.perf_counter() - begin,
        "train_loss": losses[-max(1, steps // 10) :].double().mean().item(),
        **evaluate(model, *held_out),
        "matrices": compare(optimizer, model, rows, start, lr, weight_decay),
    }
    if out is not None:
        (out / "results.json").write_text(json.dumps(found) + "\n")
        so.report.write(out / "run.jsonl", out / "report.html")
    return found


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw norm and angle of every matrix, the tracker's in colour, the calculator's dashed.

    Of several seeds the first.
    """
    results = [found for found in results if found["seed"] == results[0]["seed"]]

    def smooth(line: list[float]) -> np.ndarray:
        size = max(1, len(line) // 80)  # rows to a point: a step's angle is noisy
        return np.reshape(line[: len(line) // size * size], (-1, size)).mean(1)

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "equilibrium", "font.size": 8}):
        figure = Figure(figsize=(2.3 * len(results), 3.8), layout="constrained")
        axes = figure.subplots(2, len(results), sharex=True, squeeze=False)
        for column, found in zip(axes.T, results, strict=True):
            for colour, (name, m) in zip(COLOURS, found["matrices"].items(), strict=True):
                steps = smooth(m["steps"])
                for ax, key in zip(column, ("norm", "angle"), strict=True):
                    ax.plot(steps, smooth(m[key]["measured line"]), colour, lw=1.2, label=name)
                    ax.plot(steps, smooth(m[key]["predicted line"]), colour, ls="--", lw=1)
                    ax.set_ylim(0, max(ax.get_ylim()[1] * (key == "norm"), 2 * m[key]["predicted"]))
            column[0].set(title=found["optimizer"])
            column[1].set(xlabel="step")
        axes[0, 0].set(ylabel="norm")
        axes[1, 0].set(ylabel="angle, radians per step")
        axes[0, 0].legend(frameon=False, loc="lower right")
        figure.savefig(path, metadata={"Date": None})


def cells(results: list[dict[str, Any]], optimizer: str, name: str) -> list[str]:
    """Return a matrix's line of the table: means over seeds; angles in milliradians."""
    texts = [optimizer, name]
    for key in ("angle", "norm"):
        entries = [r["matrices"][name][key] for r in results if r["optimizer"] == optimizer]
        unit = 1e3 if key == "angle" else 1.0
        for x in ("predicted", "measured"):
            texts.append(f"{unit * np.mean([entry[x] for entry in entries]):.3f}")
        ratios = [entry["ratio"] for entry in entries]
        spread = f" ± {np.std(ratios, ddof=1):.3f}" if len(ratios) > 1 else ""
        texts.append(f"{np.mean(ratios):.3f}{spread}")
    return texts


def thinned(found: dict[str, Any]) -> dict[str, Any]:
    """Return the results without the lines."""
    matrices = {
        name: {k: {x: y for x, y in m[k].items() if "line" not in x} for k in ("angle", "norm")}
        for name, m in found["matrices"].items()
    }
    return found | {"matrices": matrices}


def write(results: list[dict[str, Any]], path: Path, command: str) -> None:
    """Write results, machine and versions, and the picture beside them."""
    about = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sphereopt": so.__version__,
    }
    rows = [thinned(found) for found in results]
    path.write_text(json.dumps({"about": about, "runs": rows}, indent=1) + "\n")
    draw(results, path.with_suffix(".svg"))


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    parser.add_argument("--data", default="digits", help="digits, an idx folder, or an .npz")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--optimizer", default="all", help=f"all, {', '.join(OPTIMIZERS)}")
    parser.add_argument("--lr", type=float, help="none: that of the optimizer, see OPTIMIZERS")
    parser.add_argument("--weight-decay", type=float, help="likewise")
    parser.add_argument("--out", type=Path, help="folder: a log and a report of each run")
    parser.add_argument("--json", type=Path, help="write the table's numbers, .svg beside them")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = vars(parsed(argv))
    path, out, wanted, first, count = (
        args.pop(key) for key in ("json", "out", "optimizer", "seed", "seeds")
    )
    names, seeds = list(OPTIMIZERS) if wanted == "all" else [wanted], range(first, first + count)
    try:
        if path is not None and not path.parent.is_dir():
            raise OptionError("json", path, "there is no such folder")
        if count < 1:
            raise OptionError("seeds", count, "must be 1 or more")
        results = []
        for seed, name in itertools.product(seeds, names):
            folder = None if out is None else out / f"{name}-{seed}"
            results.append(run(**args, seed=seed, optimizer=name, out=folder))
        if out is not None:
            draw(results, out / "equilibrium.svg")
        if path is not None:
            given = " ".join(sys.argv[1:] if argv is None else argv)
            write(results, path, f"python examples/equilibrium.py {given}")
    except (OptionError, DivergedError, OSError) as error:
        text = str(error)
        if isinstance(error, OptionError):
            text = f"--{error.option.replace('_', '-')} {error.value!r}: {error.remedy}"
        print(f"equilibrium.py: error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    heads = [f"{key} {x}" for key in ("mrad:", "norm:") for x in ("theory", "tracker", "ratio")]
    table = Table("optimizer", "matrix", *heads, box=SIMPLE_HEAD)
    for optimizer, name in itertools.product(names, results[0]["matrices"]):
        table.add_row(*cells(results, optimizer, name))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
