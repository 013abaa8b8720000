"""What weight decay does before a BatchNorm: it sets the effective learning rate, lr / norm**2.

    python examples/norm_matters_weight_decay.py [--data FOLDER] [--out runs/norm_matters]
    python examples/norm_matters_weight_decay.py --device cuda --data cifar10.npz --steps 31250 \\
        --width 64 --pixels 32 --shift 4 --lr 0.1 --weight-decay 5e-4 --train-images 50000 \\
        --valid-images 10000   # the paper's size

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
every epoch. For several seeds see benchmarks/norm_matters.py. Needs
pip install "sphereopt[examples,report]".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from rich import progress as bars
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

import sphereopt as so
from sphereopt.train import DivergedError, OptionError, fresh_folder, load

#: Arm to its colour (Okabe and Ito's) and dashes.
ARMS = {
    "decay": ("#0072b2", "-"),
    "no decay": ("#d55e00", "-"),
    "lr correction": ("#009e73", "--"),
    "norm schedule": ("#cc79a7", "--"),
    "free": ("#56b4e9", ":"),
    "fixed": ("#000000", ":"),
}
BATCH, MOMENTUM, DROP = 128, 0.9, 0.1  # lr falls by DROP at each quarter of the run
HEAD_DECAY = 5e-4  # in every arm: the head is not scale-invariant
EVALUATIONS = 24


@dataclass(frozen=True)
class Options:
    """The knobs, each with its help text; every one is an option of the command line too."""

    data: Annotated[str, "digits, a folder of idx files, or an .npz"] = "digits"
    device: Annotated[str, "cpu or cuda"] = "cpu"
    steps: Annotated[int, "training steps"] = 2000
    lr: Annotated[float, "the peak"] = 0.05
    weight_decay: Annotated[float | None, "of decay; None: set by memories"] = None
    #: Steps at peak lr forget a direction at a rate of lr * weight_decay / (1 - momentum). At the
    #: paper's 5e-4 a short run would forget nothing; the paper's 80 epochs have 16 memories.
    memories: Annotated[float, "how often decay would forget a direction, were lr constant"] = 8
    width: Annotated[int, "filters of the first layer; the paper's VGG-11 has 64"] = 8
    pixels: Annotated[int, "larger images are averaged over 2 x 2 until they are no larger"] = 16
    shift: Annotated[int, "shift images at random by so many pixels, and mirror half of them"] = 0
    train_images: Annotated[int, "the first so many"] = 6000
    valid_images: Annotated[int, "the first so many of those held out"] = 2000

    def __post_init__(self) -> None:
        no_cuda = self.device == "cuda" and not torch.cuda.is_available()
        if self.device not in ("cpu", "cuda") or no_cuda:
            raise OptionError("device", self.device, "torch finds no such device here; use cpu")
        if self.steps < 8:
            raise OptionError("steps", self.steps, "must be 8 or more: lr drops at every quarter")
        for name, value in asdict(self).items():
            least = 0 if name == "shift" else 1e-38
            if type(value) in (int, float) and not least <= value < 1e38:
                raise OptionError(name, value, "must be a positive number")

    @property
    def decay(self) -> float:
        """Weight decay of the arms that have it."""
        if self.weight_decay is not None:
            return self.weight_decay
        return self.memories * (1 - MOMENTUM) / (self.lr * self.steps)


FILES = ("run.jsonl", "results.json", "report.html")


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
    arm: str, model: nn.Sequential, norms: dict[str, Tensor], o: Options
) -> tuple[torch.optim.Optimizer, list[Any]]:
    """Return the arm's optimizer, and what is to be stepped after it."""
    lr, decay = o.lr, o.decay

    def factor(step: int) -> float:
        return DROP ** min(3, 4 * step // o.steps)

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
        set_norms(model, {name: rows[o.steps // 4] for name, rows in norms.items()})
        factors = [(lambda step: 1.0) if g["sphere"] else factor for g in own]
        later = [so.optim.RadiusSchedule.from_lr(optimizer, factor)]
    return optimizer, [torch.optim.lr_scheduler.LambdaLR(optimizer, factors), *later]


@torch.no_grad()
def set_norms(model: nn.Module, norms: dict[str, Tensor]) -> None:
    """Give filters other norms. The network computes the same as before."""
    for name, rows in norms.items():
        p = model.get_parameter(name)
        p.mul_((rows / p.flatten(1).norm(dim=1)).to(p)[:, None, None, None])


def images(o: Options) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Return training and validation images on the device, normalized, and the classes."""
    found, parts = load(o.data), []
    for x, y, count in (
        (found.train_images, found.train_labels, o.train_images),
        (found.test_images, found.test_labels, o.valid_images),
    ):
        if x.shape[1] > 4 >= x.shape[-1]:  # .npz files often have the channels last
            x = x.permute(0, 3, 1, 2)
        x = found.normalized(x[:count], torch.float32)
        while min(x.shape[-2:]) > o.pixels:
            x = avg_pool2d(x, 2)
        parts.append((x.to(o.device), y[:count].to(o.device)))
    return parts, found.classes


def shifted_and_mirrored(x: Tensor, by: int, draw: torch.Generator) -> Tensor:
    """Return every image moved by up to so many pixels each way, half of them mirrored."""
    n, _, height, width = x.shape
    top, left = torch.randint(2 * by + 1, (2, n, 1), generator=draw)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(torch.rand(n, 1, generator=draw) < 0.5, columns.flip(1), columns)
    moved = pad(x, [by] * 4)[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]]
    return moved.permute(0, 3, 1, 2).contiguous()


def batches(x: Tensor, y: Tensor, o: Options, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(o.steps):
        pick = torch.randint(len(x), (BATCH,), generator=draw).to(x.device)
        yield shifted_and_mirrored(x[pick], o.shift, draw) if o.shift else x[pick], y[pick]


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return loss and accuracy on images held out."""
    model.eval()
    outputs = torch.cat([model(part) for part in x.split(500)])
    model.train()
    right = (outputs.argmax(1) == y).float().mean()
    return cross_entropy(outputs, y).item(), right.item()


def train(model, source, optimizer, schedulers, tracker, valid, o) -> dict[str, Any]:
    """Run the plain loop; return losses, and step, loss and accuracy at every evaluation."""
    losses, curve, every = torch.zeros(o.steps, device=o.device), [], max(1, o.steps // EVALUATIONS)
    for step, (x, y) in enumerate(source, 1):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        if tracker is not None:
            tracker.log(loss=loss)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        losses[step - 1] = loss.detach()
        if step % every == 0 or step == o.steps:  # the only waits for the device
            for bad in (~losses.isfinite()).nonzero().flatten().tolist():
                raise DivergedError(f"the loss is not finite at step {bad + 1}; use a smaller lr")
            curve.append((step, *evaluate(model, *valid)))
    return {"losses": losses.tolist(), "curve": curve}


def run(
    *,
    arm: str = "decay",
    seed: int = 0,
    norms: dict[str, Tensor] | None = None,
    out: Path | None = None,
    progress: bool = True,
    **knobs: Any,
) -> dict[str, Any]:
    """Train one arm; knobs are the fields of Options, all optional.

    Norms are those that "decay" returned (None: it is run first, if needed). Returns train_loss
    (mean of the last tenth of the steps), valid_loss and valid_accuracy (means of the last eighth),
    before_drop (accuracy, mean of the last half of the first quarter), seconds, curve (step, loss,
    accuracy), norms (name to norms before every step, and the last), and all options.
    """
    o = Options(**knobs)
    if arm not in ARMS:
        raise OptionError("arm", arm, f"use one of {', '.join(ARMS)}")
    if norms is None and arm in ("lr correction", "norm schedule"):
        norms = run(arm="decay", seed=seed, progress=progress, **knobs)["norms"]
    (labelled, valid), classes = images(o)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(o.width, labelled[0].shape[1], classes, min(labelled[0].shape[-2:]))
    model = model.to(o.device)
    optimizer, schedulers = build(arm, model, norms or {}, o)
    about = asdict(o) | {"weight_decay": o.decay, "arm": arm, "seed": seed}
    begin, log = time.perf_counter(), nullcontext()
    if out is not None:
        every = max(1, o.steps // 200)
        log = so.track(optimizer, fresh_folder(out, FILES) / "run.jsonl", every=every, config=about)
    source = batches(*labelled, o, seed)
    if progress and sys.stderr.isatty():
        source = bars.track(source, f"{arm}, {seed}", o.steps, console=Console(stderr=True))
    with so.optim.NormRecorder(optimizer) as recorder, log as tracker:
        found = train(model, source, optimizer, schedulers, tracker, valid, o)
    result = about | {"seconds": time.perf_counter() - begin} | summary(found, o.steps)
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


def parsed(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    hints = get_type_hints(Options, include_extras=True)
    for field in fields(Options):
        (kind, text), option = get_args(hints[field.name]), "--" + field.name.replace("_", "-")
        kind = (get_args(kind) or (kind,))[0]
        text = f"{text} ({field.default})"
        parser.add_argument(option, type=kind, default=field.default, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches")
    parser.add_argument(
        "--out", type=Path, help="folder: a picture, and a log and a report per arm"
    )
    return vars(parser.parse_args(argv))


def all_arms(seed: int, out: Path | None, knobs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what run() returns for every arm, "decay" first: two others need its norms."""
    norms = None
    for arm in ARMS:
        folder = None if out is None else out / arm.replace(" ", "_")
        found = run(**knobs, seed=seed, arm=arm, norms=norms, out=folder)
        norms = norms or found["norms"]  # of "decay", the first
        yield found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parsed(argv)
    out = args.pop("out")
    try:
        runs = []
        for found in all_arms(args.pop("seed"), out, args):
            runs.append({key: value for key, value in found.items() if key != "norms"})
        if out is not None:
            draw(runs, out / "norm_matters.svg")
    except (OptionError, DivergedError, OSError) as error:
        text = str(error)
        if isinstance(error, OptionError):
            text = f"--{error.option.replace('_', '-')} {error.value!r}: {error.remedy}"
        print(f"norm_matters_weight_decay.py: error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    table = Table("arm", "before drop", "end", "loss", "training loss", box=SIMPLE_HEAD)
    for r in runs:
        shares = [f"{r[key]:.2%}" for key in ("before_drop", "valid_accuracy")]
        table.add_row(r["arm"], *shares, f"{r['valid_loss']:.3f}", f"{r['train_loss']:.3f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
