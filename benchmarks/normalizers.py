"""Forward and backward time of every normalization layer as a ratio to ``nn.BatchNorm2d``.

    python benchmarks/normalizers.py --write docs/results/normalizers.json

Each round times every layer once, there and back again (A B C C B A), eager and compiled; a row is
the median over rounds of the ratio to eager ``nn.BatchNorm2d`` on the same memory format in the
same round. ``L1, L2 in torch operations`` are what one would write without a backward of one's own.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sphereopt import nn as norms

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FIRST = "nn.BatchNorm2d"


class Composed(nn.Module):
    """A batch norm in torch operations, with running averages."""

    def __init__(self, channels: int, p: int) -> None:
        super().__init__()
        self.p, shape = p, (1, channels, 1, 1)
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        c = x - mean
        if self.p == 1:
            scale = c.abs().mean((0, 2, 3), keepdim=True) * 1.2533141373155001 + 1e-5
        else:
            scale = (c.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        with torch.no_grad():
            self.mean.lerp_(mean, 0.1)
            self.scale.lerp_(scale, 0.1)
        return c / scale * self.weight + self.bias


def contestants(channels: int) -> dict[str, Callable[[], nn.Module]]:
    """Return name -> what makes the layer."""
    return {
        FIRST: lambda: nn.BatchNorm2d(channels),
        "L2 in torch operations": lambda: Composed(channels, 2),
        "L1 in torch operations": lambda: Composed(channels, 1),
        "L1BatchNorm2d": lambda: norms.L1BatchNorm2d(channels),
        "LpBatchNorm2d, p=2": lambda: norms.LpBatchNorm2d(channels, p=2.0),
        "LpBatchNorm2d, p=3": lambda: norms.LpBatchNorm2d(channels, p=3.0),
        "LInfBatchNorm2d": lambda: norms.LInfBatchNorm2d(channels),
        "TopKBatchNorm2d": lambda: norms.TopKBatchNorm2d(channels),
        "VarianceNorm2d": lambda: norms.VarianceNorm2d(channels),
        "FilterResponseNorm2d": lambda: norms.FilterResponseNorm2d(channels),
        "FilterResponseNorm2d, TLU": lambda: nn.Sequential(
            norms.FilterResponseNorm2d(channels), norms.TLU(channels)
        ),
        "EvoNormS0": lambda: norms.EvoNormS0(channels),
        "EvoNormB0": lambda: norms.EvoNormB0(channels),
        "nn.GroupNorm, 32": lambda: nn.GroupNorm(32, channels),
        "GroupNorm, 32": lambda: norms.GroupNorm(channels, groups=32),
    }


class Run:
    """One layer on one input: a call is a forward and a backward pass."""

    def __init__(self, layer: nn.Module, x: Tensor, compiled: bool) -> None:
        self.layer = layer.to(x.device)
        if compiled:
            torch._dynamo.reset()
            self.layer = torch.compile(self.layer)
        self.x, self.upstream = x.clone().requires_grad_(), torch.randn_like(x)
        self()

    def __call__(self) -> float:
        """Return the seconds it took."""
        start = time.perf_counter()
        self.layer(self.x).backward(self.upstream)
        if self.x.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.x.grad = None
        for p in self.layer.parameters():
            p.grad = None
        return seconds


def measure(x: Tensor, modes: list[str], rounds: int, only: str) -> dict[tuple[str, str], float]:
    """Return (name, mode) -> median ratio to eager nn.BatchNorm2d."""
    runs = {
        (name, mode): Run(make(), x, mode == "compiled")
        for mode in modes
        for name, make in contestants(x.shape[1]).items()
        if name == FIRST or only in name
    }
    ratios: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    gc.disable()
    for _ in range(rounds):
        order = list(runs)
        once = dict.fromkeys(order, 0.0)
        for key in order + order[::-1]:
            once[key] += runs[key]()
        for key, seconds in once.items():
            ratios[key].append(seconds / once[FIRST, "eager"])
    gc.enable()
    return {key: statistics.median(values) for key, values in ratios.items()}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the markdown table of name -> column -> ratio."""
    columns = list(next(iter(rows.values())))
    lines = ["| layer | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.2f}" for c in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, default=(32, 64, 32, 32))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="eager, three rounds, a small input")
    parser.add_argument("--only", default="", help="part of a layer's name")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, rounds, modes = tuple(args.shape), args.rounds, ["eager", "compiled"]
    if args.quick:
        shape, rounds, modes = (8, 32, 8, 8), 3, ["eager"]
    rows: dict[str, dict[str, float]] = {}
    for name, memory_format in FORMATS.items():
        x = torch.randn(shape, device=device).to(memory_format=memory_format)
        for (layer, mode), ratio in measure(x, modes, rounds, args.only).items():
            rows.setdefault(layer, {})[f"{name}, {mode}"] = round(ratio, 3)
    print(table(rows))
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
        "threads": args.threads,
        "torch": torch.__version__,
        "shape": shape,
        "rounds": rounds,
        "unit": "time of forward and backward over that of eager nn.BatchNorm2d, same format",
        "command": "python benchmarks/normalizers.py --write docs/results/normalizers.json",
    }
    if args.write:
        args.write.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
