"""What weight decay does before a BatchNorm: it sets the effective learning rate, lr / norm**2.

    python examples/norm_matters_weight_decay.py [--data FOLDER] [--out runs/norm_matters]

The experiment of Hoffer et al. (2018): a VGG-11 with and without weight decay, and without it but
with the norms of the run that had it. All arms have the same weights, batches and momentum:

    decay           torch.optim.SGD with weight decay on all filters
    no decay        the same without
    lr correction   no decay, but lr / norm**2 is that of "decay", filter by filter (RadiusReplay)
    norm schedule   no decay; the filters' lr never drops, their norm rises instead (RadiusSchedule)
    free            SphereSGD(radius="free") with weight decay: torch's directions, constant norms
    fixed           SphereSGD(move="rotate"): no decay, no recording, the calculator's angle

Small differences from the paper: only filters are decayed (gains and biases are not, and the head a
little in every arm), convolutions have no bias, and norms are recorded at every step instead of
every epoch. Needs pip install "sphereopt[examples,report]".
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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from rich import progress as bars
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import sphereopt as so
from sphereopt.train import DivergedError, OptionError, load

#: Arm to its colour (Okabe and Ito's) and dashes.
ARMS = {
    "decay": ("#0072b2", "-"),
    "no decay": ("#d55e00", "-"),
    "lr correction": ("#009e73", "--"),
    "norm schedule": ("#cc79a7", "--"),
    "free": ("#56b4e9", ":"),
    "fixed": ("#000000", ":"),
}
STEPS, BATCH = 2000, 128
LR, MOMENTUM, DROP = 0.05, 0.9, 0.1  # lr falls by DROP at each quarter of the run
HEAD_DECAY = 5e-4  # in every arm: the head is not scale-invariant
#: How many times the steps at peak lr would forget a direction if they went on for the whole run:
#: lr * weight_decay * steps / (1 - momentum). It sets the weight decay of "decay", which at the
#: paper's 5e-4 would do nothing in a short run. The paper's 80 epochs have 16.
MEMORIES = 8
WIDTH = 8  # filters of the first layer; the paper's VGG-11 has 64
PIXELS = 16  # larger images are averaged over 2 x 2 until they are no larger
TRAIN_IMAGES, VALID_IMAGES = 6000, 2000  # the first so many
EVALUATIONS = 24
#: The paper's size, for a GPU; with CIFAR-10 as .npz.
FULL = {"steps": 31_250, "width": 64, "pixels": 32, "lr": 0.1, "weight_decay": 5e-4}
FULL["train_images"] = 50_000
FILES = ("run.jsonl", "results.json", "report.html")
#: 95 % of Student's distribution, by number of seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def network(width: int, channels: int, classes: int, size: int) -> nn.Sequential:
    """Return VGG-11 with BatchNorm; small images are halved less often."""
    layers: list[nn.Module] = []
    before = channels
    for times, pooled in ((1, 1), (2, 1), (4, 0), (4, 1), (8, 0), (8, 1), (8, 0), (8, 1)):
        layers += [nn.Conv2d(before, times * width, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(times * width), nn.ReLU()]
        before = times * width
        if pooled and size > 1:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def groups(model: nn.Sequential, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: filters on spheres, each on its own, and all else."""
    filters = [f"{i}.weight" for i, layer in enumerate(model) if isinstance(layer, nn.Conv2d)]
    found = so.param_groups(model, dict.fromkeys(filters, "row"))
    for group in found:
        head = any(p is model[-1].weight for _, p in group["params"])
        group["weight_decay"] = weight_decay if group["sphere"] else HEAD_DECAY * head
    return found


def build(
    arm: str, model: nn.Sequential, norms: dict[str, Tensor], o: dict[str, Any]
) -> tuple[torch.optim.Optimizer, list[Any]]:
    """Return the arm's optimizer, and what is to be stepped after it."""
    lr, decay = o["lr"], o["weight_decay"]

    def factor(step: int) -> float:
        return DROP ** min(3, 4 * step // o["steps"])

    own = groups(model, decay if arm in ("decay", "free") else 0.0)
    factors: list[Callable[[int], float]] = [factor for _ in own]
    later: list[Any] = []
    if arm in ("decay", "no decay"):
        optimizer: torch.optim.Optimizer = torch.optim.SGD(own, lr, momentum=MOMENTUM)
    elif arm == "fixed":
        settled = so.theory.equilibrium("sgd", lr=lr, weight_decay=decay, momentum=MOMENTUM)
        own = [g | ({"lr": settled.angle} if g["sphere"] else {}) for g in own]
        optimizer = so.SphereSGD(own, lr, momentum=MOMENTUM, move="rotate")
    else:
        optimizer = so.SphereSGD(own, lr, momentum=MOMENTUM, radius="free")
    if arm == "lr correction":
        later = [so.optim.RadiusReplay(optimizer, norms)]
    if arm == "norm schedule":
        # From the norms at which "decay" had settled before its first drop; lr stays where it is.
        set_norms(model, {name: rows[o["steps"] // 4] for name, rows in norms.items()})
        factors = [(lambda step: 1.0) if g["sphere"] else factor for g in own]
        later = [so.optim.RadiusSchedule.from_lr(optimizer, factor)]
    return optimizer, [torch.optim.lr_scheduler.LambdaLR(optimizer, factors), *later]


@torch.no_grad()
def set_norms(model: nn.Module, norms: dict[str, Tensor]) -> None:
    """Give filters other norms. The network computes the same as before."""
    for name, rows in norms.items():
        p = model.get_parameter(name)
        p.mul_((rows / p.flatten(1).norm(dim=1)).to(p)[:, None, None, None])


def images(o: dict[str, Any]) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Return training and validation images on the device, normalized, and the classes."""
    found, parts = load(o["data"]), []
    for x, y, count in (
        (found.train_images, found.train_labels, o["train_images"]),
        (found.test_images, found.test_labels, VALID_IMAGES),
    ):
        if x.shape[1] > 4 >= x.shape[-1]:  # .npz files often have the channels last
            x = x.permute(0, 3, 1, 2)
        x = found.normalized(x[:count], torch.float32)
        while min(x.shape[-2:]) > o["pixels"]:
            x = avg_pool2d(x, 2)
        parts.append((x.to(o["device"]), y[:count].to(o["device"])))
    return parts, found.classes


def batches(x: Tensor, y: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randint(len(x), (BATCH,), generator=draw).to(x.device)
        yield x[pick], y[pick]


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return loss and accuracy on images held out."""
    model.eval()
    outputs = torch.cat([model(part) for part in x.split(500)])
    model.train()
    right = (outputs.argmax(1) == y).float().mean()
    return cross_entropy(outputs, y).item(), right.item()


def checked(o: dict[str, Any]) -> None:
    """Raise an OptionError for the first option that cannot be used."""
    if o["arm"] not in ARMS:
        raise OptionError("arm", o["arm"], f"use one of {', '.join(ARMS)}")
    no_cuda = o["device"] == "cuda" and not torch.cuda.is_available()
    if o["device"] not in ("cpu", "cuda") or no_cuda:
        raise OptionError("device", o["device"], "torch finds no such device here; use cpu")
    if o["steps"] < 8:
        raise OptionError("steps", o["steps"], "must be 8 or more: lr drops at every quarter")
    for name in ("lr", "weight_decay", "width", "pixels", "train_images"):
        if not 0 < o[name] < math.inf:
            raise OptionError(name, o[name], "must be a positive number")


def train(model, source, optimizer, schedulers, tracker, valid, o) -> dict[str, Any]:
    """Run the plain loop; return losses, and step, loss and accuracy at every evaluation."""
    losses, curve, every = [], [], max(1, o["steps"] // EVALUATIONS)
    for step, (x, y) in enumerate(source, 1):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        if tracker is not None:
            tracker.log(loss=loss)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        losses.append(loss.detach())
        if step % every == 0 or step == o["steps"]:  # the only waits for the device
            bad = (~torch.stack(losses).isfinite()).nonzero()
            if len(bad):
                where = f"at step {int(bad[0]) + 1}; use a smaller lr"
                raise DivergedError(f"the loss is not finite {where}")
            curve.append((step, *evaluate(model, *valid)))
    return {"losses": torch.stack(losses).tolist(), "curve": curve}


def run(
    *,
    data: str = "digits",
    device: str = "cpu",
    seed: int = 0,
    steps: int = STEPS,
    arm: str = "decay",
    norms: dict[str, Tensor] | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    width: int = WIDTH,
    pixels: int = PIXELS,
    train_images: int = TRAIN_IMAGES,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train one arm; norms are those that "decay" returned (None: it is run first, if needed).

    lr None is LR, weight_decay None is set by MEMORIES. Returns train_loss (mean of the last tenth
    of the steps), valid_loss and valid_accuracy (means of the last eighth), before_drop (accuracy,
    mean of the last half of the first quarter), seconds, steps, lr, weight_decay, curve (step,
    loss, accuracy) and norms (name to norms before every step, and the last).
    """
    lr = LR if lr is None else lr
    if weight_decay is None and steps * lr > 0:
        weight_decay = MEMORIES * (1 - MOMENTUM) / (lr * steps)
    o = {"data": data, "device": device, "seed": seed, "steps": steps, "arm": arm, "lr": lr}
    o |= {"weight_decay": weight_decay, "width": width, "pixels": pixels}
    o |= {"train_images": train_images}
    checked(o)
    if norms is None and arm in ("lr correction", "norm schedule"):
        norms = run(**{**o, "arm": "decay"}, progress=progress)["norms"]
    (labelled, valid), classes = images(o)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(width, labelled[0].shape[1], classes, min(labelled[0].shape[-2:]))
    model = model.to(device)
    optimizer, schedulers = build(arm, model, norms or {}, o)
    begin, log = time.perf_counter(), nullcontext()
    if out is not None:
        log = so.track(optimizer, clean(out) / "run.jsonl", every=max(1, steps // 200), config=o)
    source = batches(*labelled, steps, seed)
    if progress and sys.stderr.isatty():
        source = bars.track(source, f"{arm}, {seed}", steps, console=Console(stderr=True))
    with so.optim.NormRecorder(optimizer) as recorder, log as tracker:
        found = train(model, source, optimizer, schedulers, tracker, valid, o)
    result = o | {"seconds": time.perf_counter() - begin} | summary(found, steps)
    if out is not None:
        (out / "results.json").write_text(json.dumps(result) + "\n")
        so.report.write(out / "run.jsonl", out / "report.html")
    return result | {"norms": recorder.norms}


def summary(found: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return the means that the table has."""
    curve, last = found["curve"], found["losses"][-max(1, steps // 10) :]
    late = [point for point in curve if point[0] > steps * 7 / 8]
    early = [point for point in curve if steps / 8 < point[0] <= steps / 4]
    return {
        "train_loss": statistics.fmean(last),
        "valid_loss": statistics.fmean(point[1] for point in late),
        "valid_accuracy": statistics.fmean(point[2] for point in late),
        "before_drop": statistics.fmean(point[2] for point in early),
        "curve": curve,
    }


def clean(out: Path) -> Path:
    """Make the folder, without what an earlier run left."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise OptionError("out", out, f"cannot write there ({error.strerror})") from None
    return out


def interval(values: Sequence[float], scale: float = 100.0) -> str:
    """Return mean and half-width of the 95 % interval over seeds."""
    text = f"{scale * statistics.fmean(values):.2f}"
    if len(values) < 2:
        return text
    half = STUDENT.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{text} ± {scale * half:.2f}"


def cells(runs: list[dict[str, Any]], arm: str) -> list[str]:
    """Return an arm's line of the table; differences are paired by seed."""
    own = [r for r in runs if r["arm"] == arm]
    base = {r["seed"]: r["valid_accuracy"] for r in runs if r["arm"] == "decay"}
    apart = [r["valid_accuracy"] - base[r["seed"]] for r in own if arm != "decay"]
    columns = [interval([r[key] for r in own]) for key in ("before_drop", "valid_accuracy")]
    losses = [interval([r[key] for r in own], 1.0) for key in ("valid_loss", "train_loss")]
    return [arm, *columns, interval(apart) if apart else "", *losses]


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy on held-out images against the step, means over seeds."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "norm_matters", "font.size": 9}):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        ax = figure.subplots()
        for arm, (colour, dashes) in ARMS.items():
            curves = [r["curve"] for r in runs if r["arm"] == arm]
            means = [statistics.fmean(x[2] for x in p) for p in zip(*curves, strict=True)]
            ax.plot([x[0] for x in curves[0]], means, dashes, color=colour, label=arm, lw=1.5)
        for quarter in (1, 2, 3):
            ax.axvline(runs[0]["steps"] * quarter / 4, color="0.85", zorder=0)
        last = [r["valid_accuracy"] for r in runs]
        ax.set(xlabel="step", ylabel="accuracy, images held out", ylim=(min(last) - 0.2, None))
        ax.legend(frameon=False, ncols=2)
        figure.savefig(path, metadata={"Date": None})


def write(runs: list[dict[str, Any]], path: Path, options: str) -> None:
    """Write results, machine and versions, and the picture beside them."""
    about = {
        "command": f"python examples/norm_matters_weight_decay.py {options}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sphereopt": so.__version__,
    }
    runs = [r | {"data": Path(r["data"]).name} for r in runs]  # not where it lies on this machine
    path.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
    draw(runs, path.with_suffix(".svg"))


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    parser.add_argument("--data", default="digits", help="digits, an idx folder, or an .npz")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lr", type=float, help=f"peak ({LR})")
    parser.add_argument("--weight-decay", type=float, help="none: set by MEMORIES")
    parser.add_argument("--width", type=int, default=WIDTH, help="filters of the first layer")
    parser.add_argument("--pixels", type=int, default=PIXELS, help="images are no larger")
    parser.add_argument("--train-images", type=int, default=TRAIN_IMAGES)
    parser.add_argument("--out", type=Path, help="folder: a log and a report of each run")
    parser.add_argument("--json", type=Path, help="write all results, a picture beside them")
    parser.add_argument("--full", action="store_true", help=f"for a GPU: {FULL}")
    if parser.parse_known_args(argv)[0].full:
        parser.set_defaults(**FULL)
    return parser.parse_args(argv)


def all_arms(seeds: range, out: Path | None, options: dict[str, Any]) -> list[dict[str, Any]]:
    runs = []
    for seed in seeds:
        norms = None
        for arm in ARMS:
            folder = None if out is None else out / f"{arm.replace(' ', '_')}-{seed}"
            found = run(**options, seed=seed, arm=arm, norms=norms, out=folder)
            norms = found.pop("norms") if arm == "decay" else norms
            runs.append({key: value for key, value in found.items() if key != "norms"})
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = vars(parsed(argv))
    path, out, first, count, _ = (args.pop(k) for k in ("json", "out", "seed", "seeds", "full"))
    try:
        if count < 1:
            raise OptionError("seeds", count, "must be 1 or more")
        if path is not None and not path.parent.is_dir():
            raise OptionError("json", path, "there is no such folder")
        runs = all_arms(range(first, first + count), out, args)
        if out is not None:
            draw(runs, out / "norm_matters.svg")
        if path is not None:
            given = " ".join(sys.argv[1:] if argv is None else argv)
            write(runs, path, given.replace(args["data"], Path(args["data"]).name))
    except (OptionError, DivergedError, OSError) as error:
        text = str(error)
        if isinstance(error, OptionError):
            text = f"--{error.option.replace('_', '-')} {error.value!r}: {error.remedy}"
        print(f"norm_matters_weight_decay.py: error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    heads = ("before drop, %", "end, %", "minus decay", "loss", "training loss")
    table = Table("arm", *heads, box=SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    for arm in ARMS:
        table.add_row(*cells(runs, arm))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
