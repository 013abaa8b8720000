"""Train VGG-11 or ResNet-20 on images: a plain loop, and the optimizer is one line.

    python examples/train_image.py --optimizer SGD --lr 0.1 --out runs/sgd
    python examples/train_image.py --optimizer SphereSGD --lr 0.1 --out runs/sphere
    python examples/train_image.py --optimizer SphereSGD --radius free --lr 0.1   # follows SGD
    torchrun --nproc-per-node 4 examples/train_image.py --device cuda --data cifar10.npz \\
        --steps 64000 --batch-size 128 --warmup 400 --amp bf16   # full size: for GPUs

Needs pip install "sphereopt[examples,report]". Without --data it learns the digits that
scikit-learn ships. With --out it leaves a log, a checkpoint, a picture and a report there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import torch
from rich import progress
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu

import sphereopt as so
from sphereopt.train import DivergedError, OptionError, fresh_folder, load

#: Optimizer and its options unless others are given. All take the same groups. Spheres of fixed
#: radius have no weight decay: there it is that of the other matrices, here the last layer.
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 5e-4}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.0}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.01}),
    "SphereSGD": (so.SphereSGD, {"momentum": 0.9, "weight_decay": 5e-4}),
    "SphereAdam": (so.SphereAdam, {"weight_decay": 0.01}),
    "SphereLion": (so.SphereLion, {"weight_decay": 0.01}),
    "SphereMuon": (so.SphereMuon, {"weight_decay": 0.01}),
}
FILES = ("run.jsonl", "checkpoint.pt", "results.json", "run.svg", "report.html")
PARTS = ("model", "optimizer", "schedule", "scaler")


@dataclass(frozen=True)
class Options:
    """The knobs, each with its help text; every one is an option of the command line too."""

    data: Annotated[str, '"digits", a folder of MNIST-like idx files, or an .npz'] = "digits"
    device: Annotated[str, "cpu or cuda"] = "cpu"
    seed: Annotated[int, "of initial weights, batches and augmentation"] = 0
    steps: Annotated[int, "training steps"] = 300
    out: Annotated[Path | None, "folder for the files; none: nothing is written"] = None
    optimizer: Annotated[str, ", ".join(OPTIMIZERS)] = "SphereSGD"
    lr: Annotated[float | None, "peak learning rate; none: the optimizer's own"] = None
    weight_decay: Annotated[float | None, "none: see the top of this file"] = None
    radius: Annotated[str | None, "of a sphere optimizer: fixed (if none is given), free"] = None
    ordinary_lr: Annotated[float | None, "of what is on no sphere; none: lr"] = None
    net: Annotated[str, "vgg11 or resnet20"] = "resnet20"
    width: Annotated[float, "multiplies the channels of the network"] = 1.0
    norm: Annotated[str, "batch, group (of 8 channels) or layer (the whole image)"] = "batch"
    norm_eps: Annotated[float, "of the norms; only at 0 is invariance exact"] = 1e-5
    batch_size: Annotated[int, "images per step, over all processes"] = 64
    warmup: Annotated[int, "steps of linear warm-up; a cosine to zero follows"] = 20
    augment: Annotated[bool | None, "shift and mirror; none: if images have 28 pixels"] = None
    images: Annotated[int | None, "at most so many for training and for validation"] = None
    dtype: Annotated[str, "float32 or float64"] = "float32"
    amp: Annotated[str | None, "bf16, or fp16 with a GradScaler (cuda)"] = None
    compile: Annotated[bool, "compile the network"] = False
    save_every: Annotated[int, "steps between checkpoints"] = 100
    resume: Annotated[bool, "continue from the checkpoint in --out"] = False
    progress: Annotated[bool, "show a bar"] = True


def check(o: Options) -> None:
    """Raise an OptionError for the first knob that cannot be used."""
    choices = {"optimizer": OPTIMIZERS, "net": NETS, "norm": NORMS, "amp": (None, "bf16", "fp16")}
    choices |= {"radius": (None, "fixed", "free"), "dtype": ("float32", "float64")}
    wrong = {k: f"use {', '.join(map(str, v))}" for k, v in choices.items() if vars(o)[k] not in v}
    for name, value in vars(o).items():
        least = 0 if name in ("warmup", "norm_eps", "weight_decay", "seed") else 1e-12
        if type(value) in (int, float) and not least <= value < 1e38:  # float32 ends there
            wrong[name] = "must be a positive number" + " or zero" * (least == 0)
    if o.radius is not None and not o.optimizer.startswith("Sphere"):
        wrong["radius"] = f"{o.optimizer} has no spheres; use SphereSGD, ..."
    if o.device not in ("cpu", "cuda") or (o.device == "cuda" and not torch.cuda.is_available()):
        wrong["device"] = "torch finds no such device here; use cpu"
    if o.amp == "fp16" and o.device == "cpu":
        wrong["amp"] = "needs cuda; use bf16"
    if o.resume and (o.out is None or not (o.out / "checkpoint.pt").is_file()):
        wrong["resume"] = f"there is no checkpoint.pt in --out {o.out}"
    for name, remedy in wrong.items():
        raise OptionError(name, vars(o)[name], remedy)


def shifted_and_mirrored(images: Tensor, generator: torch.Generator, by: int = 4) -> Tensor:
    """Return every image moved by a few pixels each way, half of them mirrored."""
    n, _, height, width = images.shape
    top, left = torch.randint(2 * by + 1, (2, n, 1), generator=generator)
    mirror = torch.rand(n, 1, generator=generator) < 0.5
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(mirror, columns.flip(1), columns)
    each = torch.arange(n)[:, None, None]
    padded = pad(images, [by] * 4)
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Images:
    """The data set on the device. Batch t is a function of seed and t, so resuming is exact."""

    def __init__(self, o: Options, rank: int, world: int) -> None:
        found = load(o.data)

        def ready(x: Tensor) -> Tensor:
            if x.shape[1] > 4 >= x.shape[-1]:  # .npz files often have the channels last
                x = x.permute(0, 3, 1, 2)
            x = x[: o.images].contiguous().to(o.device)
            return found.normalized(x, getattr(torch, o.dtype))

        self.x, self.test_x = ready(found.train_images), ready(found.test_images)
        self.y = found.train_labels[: o.images].to(o.device)
        self.test_y = found.test_labels[: o.images].to(o.device)
        self.seed, self.batch, self.classes = o.seed, o.batch_size, found.classes
        self.rank, self.world = rank, world
        self.augment = self.x.shape[-1] >= 28 if o.augment is None else o.augment
        if o.batch_size > len(self.x) or o.batch_size % world:
            text = f"must be at most {len(self.x)} (images) and a multiple of {world} (processes)"
            raise OptionError("batch_size", o.batch_size, text)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this process's part of a batch; incomplete last batches are left out."""
        epoch, index = divmod(step, len(self.x) // self.batch)
        draw = torch.Generator().manual_seed(self.seed + 2000 * epoch)
        order = torch.randperm(len(self.x), generator=draw)
        pick = order[index * self.batch :][: self.batch].to(self.x.device)
        x, y = self.x[pick], self.y[pick]
        if self.augment:
            draw.manual_seed(self.seed + 1000 + 2000 * step)
            x = shifted_and_mirrored(x, draw)
        return x.chunk(self.world)[self.rank], y.chunk(self.world)[self.rank]


NORMS: dict[str, Callable[..., nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels, eps: nn.GroupNorm(channels // 8, channels, eps),
    "layer": lambda channels, eps: nn.GroupNorm(1, channels, eps),
}


def unit(o: Options, before: int, after: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution and its norm."""
    conv = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, NORMS[o.norm](after, eps=o.norm_eps))


def scaled(o: Options, channels: int) -> int:
    return max(8, 8 * round(channels * o.width / 8))


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, o: Options, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = unit(o, before, after, stride=stride), unit(o, after, after)
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else unit(o, before, after, size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.second(relu(self.first(x))) + self.shortcut(x))


def resnet20(o: Options, shape: torch.Size, classes: int) -> nn.Module:
    """ResNet-20 for small images (He et al., 2016), with convolutions as shortcuts."""
    before = scaled(o, 16)
    layers: list[nn.Module] = [unit(o, shape[0], before), nn.ReLU()]
    for i in range(9):
        after = scaled(o, (16, 32, 64)[i // 3])
        layers.append(Block(o, before, after, stride=2 if i in (3, 6) else 1))
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def vgg11(o: Options, shape: torch.Size, classes: int) -> nn.Module:
    """VGG-11 with norms and one linear layer; small images are halved less often."""
    before, side = shape[0], min(shape[1:])
    layers: list[nn.Module] = []
    for i, channels in enumerate((64, 128, 256, 256, 512, 512, 512, 512)):
        layers += [unit(o, before, scaled(o, channels)), nn.ReLU()]
        before = scaled(o, channels)
        if i in (0, 1, 3, 5, 7) and side > 1:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


NETS = {"resnet20": resnet20, "vgg11": vgg11}


def make_optimizer(o: Options, model: nn.Module, example: Tensor) -> torch.optim.Optimizer:
    """Find the spheres and build the optimizer on them."""
    build, options = OPTIMIZERS[o.optimizer]
    given = {"lr": o.lr, "radius": o.radius, "weight_decay": o.weight_decay}
    options = options | {key: value for key, value in given.items() if value is not None}
    groups = so.param_groups(model, so.find_spheres(model, example))
    for group in groups:
        if group["sphere"] is None and o.ordinary_lr is not None:
            group["lr"] = o.ordinary_lr
        if group["sphere"] and o.optimizer.startswith("Sphere") and o.radius != "free":
            group["weight_decay"] = 0.0  # a fixed norm has nothing to decay
    return build(groups, **options)  # the line to swap: torch.optim.SGD(groups, lr=...), ...


class Run:
    """What a training step needs, and what a checkpoint holds."""

    def __init__(self, o: Options, images: Images, world: int) -> None:
        self.o, self.images, self.world = o, images, world
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(o.seed)
            model = NETS[o.net](o, images.x.shape[1:], images.classes)
        self.model = model.to(o.device, images.x.dtype)
        self.optimizer = make_optimizer(o, self.model, images.x[: max(64, o.batch_size)])
        self.lr = next(g["lr"] for g in self.optimizer.param_groups if g["sphere"] is not None)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.lr_factor)
        self.scaler = torch.amp.GradScaler(o.device, enabled=o.amp == "fp16")
        self.losses, self.done = images.x.new_zeros(o.steps), 0
        if o.resume:
            self.resume(o.out / "checkpoint.pt")
        self.net: Callable[[Tensor], Tensor] = self.model
        if world > 1:
            self.net = nn.parallel.DistributedDataParallel(self.model)
        if o.compile:
            self.net = torch.compile(self.net)

    def lr_factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.o.warmup) if self.o.warmup else 1.0
        return rise * (1 + math.cos(math.pi * step / self.o.steps)) / 2

    def step(self, tracker: Any) -> None:
        """Make one training step."""
        x, y = self.images[self.done]
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.o.amp or "")
        self.optimizer.zero_grad()
        with torch.autocast(self.o.device, half, enabled=half is not None):
            loss = cross_entropy(self.net(x), y)
        self.scaler.scale(loss).backward()
        loss = loss.detach()
        if self.world > 1:
            torch.distributed.all_reduce(loss)
            loss /= self.world
        if tracker is not None:
            tracker.log(loss=loss)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.losses[self.done] = loss
        self.done += 1

    def check_losses(self) -> None:
        """Stop at a loss that is not finite; this is where the host waits for the device."""
        for step in (~self.losses[: self.done].isfinite()).nonzero().flatten().tolist():
            where = f"the loss is {self.losses[step]:g} at step {step + 1}, not finite"
            raise DivergedError(f"stopped: {where}; use a smaller lr than {self.lr:g}")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy on the images held out."""
        self.model.eval()
        out = torch.cat([self.model(x) for x in self.images.test_x.split(500)])
        self.model.train()
        y, right = self.images.test_y, (out.argmax(1) == self.images.test_y).double().mean()
        return {"valid_loss": cross_entropy(out, y).item(), "valid_accuracy": right.item()}

    def lasting(self) -> dict[str, str]:
        """Return the knobs that a resumed run must share with what it continues."""
        free = ("out", "resume", "progress", "save_every", "device", "compile")
        return {key: str(value) for key, value in vars(self.o).items() if key not in free}

    def save(self, path: Path) -> None:
        """Write the checkpoint; one that a crash cuts off does not replace the last."""
        state = {name: vars(self)[name].state_dict() for name in PARTS}
        state |= {"losses": self.losses[: self.done].tolist(), "options": self.lasting()}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def resume(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.o.device, weights_only=True)
        except Exception as error:  # torch.load has no type of its own for a broken file
            raise OptionError("resume", path, f"cannot be read ({error})") from None
        for key, value in self.lasting().items():
            if (old := state["options"][key]) != value:
                raise OptionError(key, value, f"the checkpoint was made with {old}; use that")
        for name in PARTS:
            vars(self)[name].load_state_dict(state[name])
        self.done = len(state["losses"])
        self.losses[: self.done] = self.losses.new_tensor(state["losses"])


def processes(device: str) -> tuple[int, int]:
    """Join what torchrun started; return the number of this process and how many there are."""
    world, rank = (int(os.environ.get(x, y)) for x, y in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if world > 1 and not torch.distributed.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    return rank, world


def train(job: Run, writes: bool) -> None:
    """Make the steps that are left."""
    o, done, log = job.o, job.done, nullcontext()
    if writes:
        about = {"every": max(1, o.steps // 200), "start": done, "config": job.lasting()}
        log = so.track(job.optimizer, o.out / "run.jsonl", **about)
    bar = {"console": Console(stderr=True), "disable": not (o.progress and sys.stderr.isatty())}
    with log as tracker:
        for step in progress.track(range(done + 1, o.steps + 1), o.optimizer, **bar):
            job.step(tracker)
            if step % o.save_every == 0 or step == o.steps:
                job.check_losses()
                if writes:
                    job.save(o.out / "checkpoint.pt")


def run(**knobs: Any) -> dict[str, Any]:
    """Train once; the arguments are the fields of Options, all optional.

    Returns train_loss (mean of the last tenth), valid_loss, valid_accuracy, lr, losses, ...
    """
    o = Options(**knobs)
    check(o)
    rank, world = processes(o.device)
    job, writes = Run(o, Images(o, rank, world), world), o.out is not None and rank == 0
    if writes:
        fresh_folder(o.out, () if o.resume else FILES)
    begin = time.perf_counter()
    train(job, writes)
    seconds, losses = time.perf_counter() - begin, job.losses.tolist()
    last = losses[-max(1, len(losses) // 10) :]
    results = {"optimizer": o.optimizer, "lr": job.lr, "train_loss": sum(last) / len(last)}
    results |= job.evaluate() | {"seconds": seconds, "steps": o.steps, "losses": losses}
    if writes:
        (o.out / "results.json").write_text(json.dumps(results) + "\n")
        so.report.instruments.metric(o.out / "run.jsonl", "loss").savefig(o.out / "run.svg")
        so.report.write(o.out / "run.jsonl", o.out / "report.html")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, of which every field of Options is an option; return the exit code."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("train_image.py", description=about, allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    for name, hint in get_type_hints(Options, include_extras=True).items():
        kinds, text = get_args(hint)
        kind = (get_args(kinds) or (kinds,))[0]
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        option, default = "--" + name.replace("_", "-"), getattr(Options, name)
        parser.add_argument(option, default=default, help=f"{text} ({default})", **how)
    try:
        results = run(**vars(parser.parse_args(argv)))
    except (OptionError, DivergedError) as error:
        print(f"train_image.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_image.py: interrupted; --resume goes on from the checkpoint", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        table = Table("result", "value")
        for key in [key for key in results if key != "losses"]:
            table.add_row(key, format(results[key], "" if key == "optimizer" else ".4g"))
        Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
