"""Train one network three ways from the same weights on the same batches, and compare."""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import Optimizer

import sphereopt
from sphereopt import spheres
from sphereopt.detect import SphereReport, find_spheres
from sphereopt.groups import param_groups
from sphereopt.monitor import Tracker, read_jsonl, track
from sphereopt.train.arms import ARMS, Arm, set_lr
from sphereopt.train.config import FLOOR, MOMENTUM, SMOOTHING, Config, OptionError, predicted_angle
from sphereopt.train.data import Dataset, load
from sphereopt.train.forecast import ForecastPoint, forecast
from sphereopt.train.model import WIDTHS, build_model
from sphereopt.train.results import (
    ArmResult,
    NormPoint,
    Quartiles,
    Results,
    mean_angles,
    second_half,
)

__all__ = ["DivergedError", "Progress", "check_batch_size", "train"]

#: Called after every step with arm, steps made by it, and loss.
Progress = Callable[[Arm, int, float], None]

_ROWS = 200
_ACCURACY_POINTS = 25
_CURVE_IMAGES = 1000
_CHUNK = 500


class DivergedError(RuntimeError):
    """The training loss is not finite any more."""


@dataclass(frozen=True)
class _Race:
    """What the arms share."""

    config: Config
    data: Dataset
    dtype: torch.dtype
    model: nn.Module
    report: SphereReport
    log_every: int
    curve_every: int
    curve_images: int


@dataclass(frozen=True)
class _Run:
    """What one arm measured, and of every sphere at the logged steps: norms, size of gradients."""

    result: ArmResult
    believed: Tensor
    stored: Tensor
    grad_norms: Tensor


def check_batch_size(config: Config, data: Dataset) -> None:
    """Raise an OptionError if a batch needs more images than there are.

    Args:
        config: The run's options.
        data: The images.
    """
    if config.batch_size > len(data.train_images):
        raise OptionError(
            "batch_size",
            config.batch_size,
            f"there are {len(data.train_images)} training images; use that many or fewer",
        )


def train(
    config: Config,
    out: str | Path,
    *,
    data: Dataset | None = None,
    progress: Progress | None = None,
) -> Results:
    """Train with ``torch.optim.SGD``, and twice on the spheres, and compare.

    All arms start from the same weights and see the same batches: (a) ``torch.optim.SGD``; (b)
    ``SphereSGD(radius="free")`` with the same options, which must follow (a); (c) ``SphereSGD``
    with fixed radii and ``move="rotate"``, whose learning rate is (a)'s equilibrium angle.

    Args:
        config: Options.
        out: Folder for ``sgd.jsonl``, ``free.jsonl``, ``fixed.jsonl``, the trackers' rows; files of
            these names are replaced.
        data: The images, if loaded already.
        progress: Called after every step with the arm, the steps it has made, and its loss.

    Returns:
        The results.

    Raises:
        OptionError: If the data cannot be used, or has fewer images than a batch.
        DivergedError: If a loss is not finite; the message says where.

    Notes:
        torch's generators, default dtype and number of threads are left as they were found. The
        same options give the same numbers on the same machine.
    """
    start = time.perf_counter()
    data = load(config.data) if data is None else data
    check_batch_size(config, data)
    with _threads(config.threads):
        race = _prepare(config, data)
        runs = {arm.name: _run(race, arm, Path(out), progress) for arm in ARMS}
    first = next(iter(runs.values()))
    return Results(
        config=config,
        recipe=_recipe(),
        data=_describe(data),
        spheres=_layers(race.report),
        sphere_count=first.stored.shape[1],
        predicted=_predicted(race),
        forecast=_forecast(race, first),
        log_every=race.log_every,
        curve_images=race.curve_images,
        arms={name: _compared(run, first) for name, run in runs.items()},
        versions=_versions(),
        seconds=time.perf_counter() - start,
    )


def _layers(report: SphereReport) -> dict[str, str]:
    """Return the weights on spheres of their own; pairs of gain and bias stay where they are."""
    return {name: spec for name, spec in report.spheres.items() if isinstance(name, str)}


def _prepare(config: Config, data: Dataset) -> _Race:
    dtype: torch.dtype = getattr(torch, config.dtype)
    model = build_model(
        data.train_images.shape[1],
        data.classes,
        seed=config.seed,
        dtype=dtype,
        norm_eps=config.norm_eps,
    )
    # As many images as a batch, and enough that no filter stays silent on all of them.
    example = data.normalized(data.train_images[: max(config.batch_size, 64)], dtype)
    try:
        report = find_spheres(model, example)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise OptionError(
            "data", config.data, f"the network cannot be analysed on these images: {reason}"
        ) from None
    if not _layers(report):
        raise OptionError(
            "data", config.data, "no weight is scale-invariant on these images; are they blank?"
        )
    return _Race(
        config=config,
        data=data,
        dtype=dtype,
        model=model,
        report=report,
        log_every=max(1, config.steps // _ROWS),
        curve_every=max(1, config.steps // _ACCURACY_POINTS),
        curve_images=min(_CURVE_IMAGES, len(data.test_images)),
    )


def _run(race: _Race, arm: Arm, out: Path, progress: Progress | None) -> _Run:
    """Train one arm."""
    start, config, data = time.perf_counter(), race.config, race.data
    model = copy.deepcopy(race.model)
    optimizer = arm.build(param_groups(model, race.report), config)
    path = out / f"{arm.name}.jsonl"
    path.unlink(missing_ok=True)
    log = _Log(race, model, optimizer)
    options = {key: str(x) for key, x in asdict(config).items()}
    with track(optimizer, path, every=race.log_every, config=options) as tracker:
        for step, batch in enumerate(_batches(len(data.train_images), config), 1):
            set_lr(optimizer, step - 1, config)
            images = data.normalized(data.train_images[batch], race.dtype)
            loss = _step(model, optimizer, images, data.train_labels[batch], tracker)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss of arm ({arm.letter}) is {loss} at step {step}; use a smaller lr "
                    f"than {config.lr:g}"
                )
            log.add(step, loss)
            if progress is not None:
                progress(arm, step, loss)
    return log.run(arm, path, time.perf_counter() - start)


class _Log:
    """What is written down while an arm trains, beside the tracker's rows."""

    def __init__(self, race: _Race, model: nn.Module, optimizer: Optimizer) -> None:
        self.race, self.model, self.optimizer = race, model, optimizer
        self.losses: list[float] = []
        self.curve = [(0, _accuracy(model, race, race.curve_images))]
        self.norms = [(0, *_norms(optimizer))]

    def add(self, step: int, loss: float) -> None:
        """Note what there is to note after a step."""
        self.losses.append(loss)
        if step % self.race.log_every == 0:
            self.norms.append((step, *_norms(self.optimizer)))
        if step % self.race.curve_every == 0:
            self.curve.append((step, _accuracy(self.model, self.race, self.race.curve_images)))

    def run(self, arm: Arm, path: Path, seconds: float) -> _Run:
        """Return the arm's result; its distance to the first arm is still open."""
        config = self.race.config
        steps, *columns = zip(*self.norms, strict=True)
        believed, stored, gradients = map(torch.stack, columns)
        angles = mean_angles(read_jsonl(path))
        result = ArmResult(
            letter=arm.letter,
            optimizer=arm.optimizer,
            test_accuracy=_accuracy(self.model, self.race, len(self.race.data.test_images)),
            angle=second_half(angles, config),
            predicted_angle=second_half(_predicted(self.race), config),
            loss_gap=0.0,
            norm_gap=0.0,
            stored_drift=_largest_change(stored, stored[:1]),
            loss=self.losses,
            accuracy=self.curve,
            norms=_points(steps, believed, stored),
            angles=angles,
            seconds=seconds,
        )
        return _Run(result, believed, stored, gradients[1:])


def _predicted(race: _Race) -> list[tuple[int, float]]:
    """Return the predicted angle at every logged step."""
    steps = range(race.log_every, race.config.steps + 1, race.log_every)
    return [(step, predicted_angle(step - 1, race.config)) for step in steps]


def _forecast(race: _Race, first: _Run) -> list[ForecastPoint]:
    """Return what the calculator says of the first arm at every logged step."""
    steps = [point.step for point in first.result.norms[1:]]
    return forecast(race.config, first.stored[0], steps, first.grad_norms)


def _step(
    model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, tracker: Tracker
) -> float:
    optimizer.zero_grad()
    loss = cross_entropy(model(images), labels, label_smoothing=SMOOTHING)
    torch.autograd.backward(loss)
    tracker.log(loss=loss)
    optimizer.step()
    return loss.item()


def _batches(count: int, config: Config) -> Iterator[Tensor]:
    """Yield the indices of every batch: epochs in random order, incomplete batches left out."""
    generator = torch.Generator().manual_seed(config.seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(config.steps):
        if len(left) < config.batch_size:
            left = torch.randperm(count, generator=generator)
        yield left[: config.batch_size]
        left = left[config.batch_size :]


@torch.no_grad()
def _accuracy(model: nn.Module, race: _Race, count: int) -> float:
    """Return the share of the first test images that the model, in eval mode, gets right."""
    model.eval()
    data, right = race.data, 0
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        guess = model(data.normalized(data.test_images[part], race.dtype)).argmax(1)
        right += int((guess == data.test_labels[part]).sum())
    model.train()
    return right / count


@torch.no_grad()
def _norms(optimizer: Optimizer) -> tuple[Tensor, Tensor, Tensor]:
    """Return believed and stored norms of all spheres, and stored ones times those of gradients."""
    believed, stored, gradients = [], [], []
    for group in optimizer.param_groups:
        if group["sphere"] is None:
            continue
        for p in group["params"]:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            norm, slope = (
                spheres.view(x, group["sphere"]).flatten(1).to(torch.float64).norm(dim=1)
                for x in (p, grad)
            )
            radius = optimizer.state[p].get("virtual_radius", norm)
            believed.append(radius.to(torch.float64).clone())
            stored.append(norm)
            gradients.append(slope * norm)
    return torch.cat(believed), torch.cat(stored), torch.cat(gradients)


def _points(steps: Sequence[int], believed: Tensor, stored: Tensor) -> list[NormPoint]:
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    tables = [torch.quantile(x, at, dim=1).T.tolist() for x in (believed, stored)]
    return [
        NormPoint(step, Quartiles(*one), Quartiles(*other))
        for step, one, other in zip(steps, *tables, strict=True)
    ]


def _largest_change(x: Tensor, reference: Tensor) -> float:
    return float(((x - reference) / reference).abs().max())


def _compared(run: _Run, first: _Run) -> ArmResult:
    """Return the result of an arm with its distance to the first arm filled in."""
    pairs = zip(run.result.loss, first.result.loss, strict=True)
    return replace(
        run.result,
        loss_gap=max(abs(x - y) for x, y in pairs),
        norm_gap=_largest_change(run.believed, first.believed),
    )


def _recipe() -> dict[str, str]:
    return {
        "network": f"3x3 convolutions of {', '.join(map(str, WIDTHS))} channels without bias, each "
        "with BatchNorm and ReLU; global average pooling; a linear head",
        "momentum": f"{MOMENTUM:g}",
        "schedule": f"a cosine from lr to {FLOOR:g} lr",
        "label smoothing": f"{SMOOTHING:g}",
        "norm gains and biases": "no weight decay",
        "augmentation": "none",
    }


def _describe(data: Dataset) -> dict[str, object]:
    return {
        "name": data.name,
        "train_images": len(data.train_images),
        "test_images": len(data.test_images),
        "image_shape": list(data.train_images.shape[1:]),
        "classes": data.classes,
    }


def _versions() -> dict[str, str]:
    return {
        "sphereopt": sphereopt.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use this many threads inside, as many as before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
