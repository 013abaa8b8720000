"""What the tracker costs: time against a training step of ResNet-18, memory against the model.

    python benchmarks/tracker_overhead.py [--rounds 15] [--write docs/results/tracker_overhead.json]

Forward and backward do not know the tracker, so what is compared is ``optimizer.step()``: without a
tracker, with one whose file takes every step, and with one on a step that it does not log;
interleaved, medians of the differences, each over the median time of a whole training step. Memory
is the most that was allocated at once during ``optimizer.step()``, by torch's profiler.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import sphereopt as so

BATCH, CLASSES = 32, 100
#: Side of the images; the network is made for 224, and 64 is a twelfth of that work.
SIZES = (224, 64)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SphereSGD": lambda p: so.SphereSGD(p, lr=0.1, momentum=0.9),
    "SphereSGD, free": lambda p: so.SphereSGD(
        p, lr=0.1, momentum=0.9, weight_decay=5e-4, radius="free"
    ),
    "SphereAdam": lambda p: so.SphereAdam(p, lr=1e-3),
    "torch.optim.SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "torch.optim.AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
}


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1:
            conv = nn.Conv2d(before, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


def resnet18() -> nn.Sequential:
    """Return ResNet-18 as published, for images of ImageNet's kind."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    blocks = []
    for before, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        blocks += [Block(before, width, 1 if before == width else 2), Block(width, width, 1)]
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)
    )


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    specs = {name: "row" for name, p in model.named_parameters() if p.ndim == 4}
    return so.param_groups(model, specs)


def backward(model: nn.Module, size: int) -> None:
    x, y = torch.randn(BATCH, 3, size, size), torch.randint(CLASSES, (BATCH,))
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak(call: Callable[[], object], folder: Path) -> int:
    """Return the most that was allocated at once beyond what was at the start, in bytes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as p:
        call()
    p.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def measure(name: str, rounds: int, folder: Path) -> dict[str, float]:
    """Return what one optimizer's tracker costs."""
    torch.manual_seed(0)
    model = resnet18()
    optimizer = OPTIMIZERS[name](groups_of(model))
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def tracked(every: int) -> float:
        with so.track(optimizer, folder / "run.jsonl", every=every):
            optimizer.step()  # opens the file, takes the first samples
            return seconds(optimizer.step)

    def plain_step() -> float:
        optimizer.step()
        return seconds(optimizer.step)

    def kept() -> int:
        with so.track(optimizer, folder / "run.jsonl") as tracker:
            optimizer.step()
            samples = tracker._window._samples.values()
            return sum(x.numel() * x.element_size() for s in samples for x in s.weights)

    backward(model, SIZES[-1])
    optimizer.step()
    plain, logged, unlogged = [], [], []
    for _ in range(rounds):
        # There and back again, so that a drift of the machine hits all alike.
        for kind in (0, 1, 2, 2, 1, 0):
            ways = (plain_step, lambda: tracked(1), lambda: tracked(1 << 60))
            (plain, logged, unlogged)[kind].append(ways[kind]())
    extra, idle = (
        statistics.median(b - a for a, b in zip(plain, x, strict=True)) for x in (logged, unlogged)
    )
    bare = peak(optimizer.step, folder)
    with so.track(optimizer, folder / "run.jsonl"):
        most = peak(optimizer.step, folder)
    return {
        "optimizer.step (ms)": 1e3 * statistics.median(plain),
        "logged step adds (ms)": 1e3 * extra,
        "other step adds (ms)": 1e3 * idle,
        "kept (% of the model)": 100 * kept() / size,
        "peak of a step (% of the model)": 100 * bare / size,
        "peak of a logged step (% of the model)": 100 * most / size,
        "row (kB)": (folder / "run.jsonl").read_bytes().splitlines()[-1].__sizeof__() / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", type=Path, help="write figures, machine and versions as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, float]] = {}
    model = resnet18()
    both = {size: [seconds(lambda: backward(model, size)) for _ in range(4)][1:] for size in SIZES}  # noqa: B023
    with tempfile.TemporaryDirectory() as folder:
        for name in OPTIMIZERS:
            results[name] = found = measure(name, args.rounds, Path(folder))
            for size, times in both.items():
                step = 1e3 * statistics.median(times) + found["optimizer.step (ms)"]
                extra, idle = found["logged step adds (ms)"], found["other step adds (ms)"]
                found[f"{size} px: training step (ms)"] = step
                found[f"{size} px: every step (%)"] = 100 * extra / step
                found[f"{size} px: every 50 steps (%)"] = 2 * (extra + 49 * max(idle, 0.0)) / step
            print(name)
            for key, value in results[name].items():
                print(f"  {key:<40} {value:10.3f}")
    if args.write:
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, shared",
            "threads": args.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "batch": BATCH,
            "rounds": args.rounds,
        }
        args.write.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
