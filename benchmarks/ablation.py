"""What projection, transport, the move and a fixed angle buy in training, one factor at a time.

    python benchmarks/ablation.py [--data FOLDER] [--text FILE] [--tasks conv-sgd,gpt-adam]
        [--arms GLOB;...] [--more 0] [--jobs 1] [--out docs/results/ablation.json]

Every arm has its own grid of learning rates, in steps of a factor 2, that grows until the best is
inside; it is chosen on three seeds. Five other seeds are then run at it, and only these are
reported, paired with those of the centre arm: same initialization, same batches. Finished runs are
saved at once, and a second call goes on where the first one stopped. ``ablation_table.py`` writes
the tables and the picture.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path

import torch
from ablation_tasks import TASKS, Task, loss, make, measure
from torch import Tensor

import sphereopt as so
from sphereopt import geometry

CHOOSE, REPORT = (0, 1, 2), (3, 4, 5, 6, 7)
MOMENTUM, WARM_UP = 0.9, 0.05
BUFFER = {"sgd": "momentum_buffer", "adam": "exp_avg"}
CENTRE_MOVE = {"sgd": "retract", "adam": "rotate"}
CENTRE = {"sgd": "retract, project", "adam": "rotate, project"}
DECAYS = {"sgd": (0.0, 1e-3, 1e-2, 1e-1), "adam": (0.0, 0.1, 1.0)}
#: Where the grids begin: (family, unit of lr) -> learning rates.
START = {
    ("sgd", "gradient"): (0.05, 0.1, 0.2),
    ("sgd", "radians"): (0.01, 0.02, 0.04),
    ("sgd", "torch"): (0.2, 0.4, 0.8),
    ("adam", "gradient"): (2e-3, 4e-3, 8e-3),
    ("adam", "radians"): (0.01, 0.02, 0.04),
    ("adam", "torch"): (4e-3, 8e-3, 1.6e-2),
}


@dataclass(frozen=True)
class Arm:
    """One way to step.

    Attributes:
        name: As in the tables.
        move: A key of ``sphereopt.moves.MOVES``, or "" for torch's own optimizer.
        transport: What the optimizer is given.
        project: By hand: the gradient is made tangent before the step.
        carry: By hand: the tangent part of the buffer is transported after the step, like this.
        decay: Weight decay of torch's optimizer on what is on spheres in the other arms.
    """

    name: str
    move: str
    transport: str = "none"
    project: bool = False
    carry: str = ""
    decay: float = 0.0

    @property
    def unit(self) -> str:
        """What lr is: an angle, a factor on the gradient or Adam's direction, or torch's own."""
        if not self.move:
            return "torch"
        return "radians" if self.move in so.moves.RADIANS else "gradient"


def arms(family: str) -> list[Arm]:
    """Return the arms: moves, transport x projection at the centre move, torch's own."""
    middle = CENTRE_MOVE[family]
    found = [Arm(CENTRE[family], middle, "project")]
    found += [Arm(f"{middle}, {how}", middle, how) for how in ("parallel", "rescale", "none")]
    found.append(Arm(f"{middle}, none, tangent gradient", middle, project=True))
    if family == "adam":  # SGD is linear: its next projection makes these the library's own arms
        found += [
            Arm(f"{middle}, {how}, raw gradient", middle, carry=how)
            for how in ("project", "parallel", "rescale")
        ]
    found += [Arm(f"{move}, project", move, "project") for move in so.moves.MOVES if move != middle]
    found += [Arm(f"{move}, none", move) for move in ("renorm", "hyperball", "rotate")]
    found += [Arm(f"torch, decay {decay:g}", "", decay=decay) for decay in DECAYS[family]]
    return list({arm.name: arm for arm in found}.values())


def optimizer(task: Task, arm: Arm, groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """Return the optimizer of an arm; what is on no sphere has the same lr in all of them."""
    for group in groups:
        on_sphere = group["sphere"] is not None
        group["lr"] = lr if on_sphere else task.ordinary_lr
        group["weight_decay"] = arm.decay if on_sphere else 0.0
        if on_sphere and arm.move:
            group |= {"move": arm.move, "transport": arm.transport}
    if task.family == "sgd":
        kind = so.SphereSGD if arm.move else torch.optim.SGD
        return kind(groups, lr=lr, momentum=MOMENTUM)
    return (so.SphereAdam if arm.move else torch.optim.AdamW)(groups, lr=lr)


def shared(opt: torch.optim.Optimizer) -> list[tuple[str, list[Tensor]]]:
    """Return the tensors on spheres with their spec; those of a joint sphere come together."""
    groups = [g for g in opt.param_groups if g["sphere"]]
    return [
        (g["sphere"], tensors)
        for g in groups
        for tensors in ([g["params"]] if g["joint"] else [[p] for p in g["params"]])
    ]


def flat(tensors: list[Tensor], sphere: str) -> Tensor:
    """Return the spheres of the tensors as rows of one matrix (a copy)."""
    return torch.cat([so.spheres.view(x.detach(), sphere).flatten(1) for x in tensors], 1)


def put(rows: Tensor, tensors: list[Tensor], sphere: str) -> None:
    """Undo :func:`flat`, in place."""
    views = [so.spheres.view(x.detach(), sphere) for x in tensors]
    parts = rows.split([math.prod(v.shape[1:]) for v in views], 1)
    for view, part in zip(views, parts, strict=True):
        view.copy_(part.reshape(view.shape))


def positions(opt: torch.optim.Optimizer) -> list[Tensor]:
    """Return where everything on spheres is now."""
    return [flat(tensors, sphere) for sphere, tensors in shared(opt)]


@contextmanager
def by_hand(opt: torch.optim.Optimizer, arm: Arm, buffer: str) -> Iterator[None]:
    """Do around a step what the optimizer has no option for: project or carry, but not both."""
    old = positions(opt) if arm.project or arm.carry else []
    if arm.project:
        for (sphere, tensors), w in zip(shared(opt), old, strict=True):
            grads = [p.grad for p in tensors]
            put(geometry.tangent(w, flat(grads, sphere), "row"), grads, sphere)
    yield
    if arm.carry:
        for (sphere, tensors), w, y in zip(shared(opt), old, positions(opt), strict=True):
            buffers = [opt.state[p][buffer] for p in tensors]
            m = geometry.tangent(w, flat(buffers, sphere), "row")
            put(geometry.transport(w, y, m, "row", arm.carry), buffers, sphere)


def angle(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the median angle that the spheres have turned, in radians."""
    turned = [geometry.angle(w, y, "row") for w, y in zip(before, after, strict=True)]
    return float(torch.cat(turned).median())


def train(
    task: Task, arm: Arm, opt: torch.optim.Optimizer, model: torch.nn.Module, seed: int
) -> dict[str, float]:
    """Train with a short warm-up and a cosine, and return the training loss and two angles."""
    warm, steps = WARM_UP * task.steps, task.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda t: min(1, (t + 1) / warm) * 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    generator = torch.Generator().manual_seed(1000 + seed)
    losses, angles = [], {}
    watched = {steps // 2: "angle, half-way", steps - 1: "angle, last step"}
    for step in range(steps):
        opt.zero_grad()
        value = loss(model, task.draw(generator))
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            break
        value.backward()
        old = positions(opt) if step in watched else []
        with by_hand(opt, arm, BUFFER[task.family]):
            opt.step()
        if step in watched:
            angles[watched[step]] = angle(old, positions(opt))
        schedule.step()
    return {"training loss": statistics.fmean(losses[-steps // 10 :]), **angles}


def run(task: Task, arm: Arm, lr: float, seed: int) -> dict[str, float]:
    """Train once and return the figures of the run."""
    start = time.perf_counter()
    model = task.model(seed)
    figures = train(task, arm, optimizer(task, arm, task.groups(model), lr), model, seed)
    held_out, accuracy = measure(model, task)
    seconds = time.perf_counter() - start
    return {"held-out loss": held_out, "accuracy": accuracy, **figures, "seconds": seconds}


def finite(row: dict) -> float:
    """Return the held-out loss of a run, infinite if it diverged."""
    value = row["held-out loss"]
    return math.inf if value is None else value


def best_lr(rows: list[dict]) -> float:
    """Return the learning rate with the best mean over the seeds to choose on."""
    by_lr = defaultdict(list)
    for row in rows:
        if row["seed"] in CHOOSE:
            by_lr[row["lr"]].append(finite(row))
    return min(by_lr, key=lambda lr: statistics.fmean(by_lr[lr]))


def wanted(family: str, arm: Arm, rows: list[dict], more: int = 0) -> list[tuple[float, int]]:
    """Return the runs, as lr and seed, that an arm needs next; none when it is complete."""
    fresh = (*REPORT, *range(REPORT[-1] + 1, REPORT[-1] + 1 + more))
    done = {(row["lr"], row["seed"]) for row in rows}
    grid = sorted({*START[family, arm.unit], *(lr for lr, _ in done)})
    missing = [(lr, seed) for lr in grid for seed in CHOOSE if (lr, seed) not in done]
    if missing:
        return missing
    best = best_lr(rows)
    if best in (grid[0], grid[-1]):
        further = best / 2 if best == grid[0] else best * 2
        return [(further, seed) for seed in CHOOSE]
    return [(best, seed) for seed in fresh if (best, seed) not in done]


def machine() -> dict[str, str]:
    """Return what the figures were made with."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread per run",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sphereopt": so.__version__,
    }


class Results:
    """The file of finished runs."""

    def __init__(self, path: Path, about: dict) -> None:
        self.path = path
        new = {"about": about, "tasks": {}, "runs": []}
        self.content = json.loads(path.read_text()) if path.exists() else new
        self.content["about"] |= about

    def declare(self, name: str, setup: dict) -> None:
        """Note the set-up of a task, which runs already there must share."""
        known = self.content["tasks"].setdefault(name, setup)
        if known != json.loads(json.dumps(setup)) and known is not setup:
            differ = [key for key in setup if known.get(key) != setup[key]]
            raise SystemExit(
                f"{self.path} has runs of {name} with other {', '.join(differ)}; use another --out"
            )

    def rows(self, task: str, arm: str) -> list[dict]:
        """Return the finished runs of an arm."""
        return [r for r in self.content["runs"] if (r["task"], r["arm"]) == (task, arm)]

    def add(self, row: dict) -> None:
        """Add a run and save everything."""
        self.content["runs"].append(row)
        self.save()

    def save(self) -> None:
        """Write the file, one run per line, so that it is whole at every moment."""
        part = self.path.with_suffix(".part")
        lines = ",\n  ".join(json.dumps(r) for r in self.content["runs"])
        head = {k: v for k, v in self.content.items() if k != "runs"}
        part.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "runs": [\n  {lines}\n ]\n}}\n')
        part.replace(self.path)


def one(name: str, data: str, corpus: str, arm: Arm, lr: float, seed: int) -> dict:
    """Make one run in a process of its own."""
    torch.set_num_threads(1)
    figures = run(make(name, data, corpus), arm, lr, seed)
    return {"task": name, "arm": arm.name, "lr": lr, "seed": seed} | {
        key: float(f"{value:.6g}") if math.isfinite(value) else None
        for key, value in figures.items()
    }


def work(name: str, chosen: list[Arm], results: Results, args: argparse.Namespace) -> None:
    """Run what a task still needs."""
    family = name.split("-")[1]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        running: dict[Future, tuple] = {}
        while True:
            for arm in chosen:
                for lr, seed in wanted(family, arm, results.rows(name, arm.name), args.more):
                    key = (arm.name, lr, seed)
                    if len(running) < args.jobs and key not in running.values():
                        future = pool.submit(one, name, args.data, args.text, arm, lr, seed)
                        running[future] = key
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                running.pop(future)
                results.add(row := future.result())
                print(
                    f"{name}  {row['arm']:34s} lr {row['lr']:<8g} seed {row['seed']}  "
                    f"held-out {row['held-out loss']}  {row['seconds']:.1f} s",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="images, as `sphereopt train` takes them")
    parser.add_argument("--text", default="", help="a text file; by default Python's own source")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--arms", default="*", help="names or globs, semicolon-separated")
    parser.add_argument("--more", type=int, default=0, help="further seeds to report on")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/ablation.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = f"--data {Path(args.data).name} --text {Path(args.text).name!r}"
    command = f"python benchmarks/ablation.py {names}"
    results = Results(args.out, {"command": command, **machine()})
    for name in args.tasks.split(","):
        results.declare(name, make(name, args.data, args.text).setup())
        globs = args.arms.split(";")
        known = arms(name.split("-")[1])
        chosen = [arm for arm in known if any(fnmatchcase(arm.name, glob) for glob in globs)]
        work(name, chosen, results, args)
    results.save()


if __name__ == "__main__":
    sys.exit(main())
