"""Ten normalizers in random networks: variance, similarity, rank and gradient over depth.

    python benchmarks/beyond_batchnorm.py --write docs/results/beyond_batchnorm.json

Networks of 3x3 convolutions at initialization (normal weights, Kaiming's fan-in), fed smooth
random images. *Plain*: ``x = act(norm(conv(x)))``; *residual*: ``x = x + act(norm(conv(x)))``
after a first convolution. The loss is the cross-entropy of random labels, of a linear map of the
averages over positions. Everything is measured as in Beyond BatchNorm (Lubana, Dick, Tanaka, 2021).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sphereopt.nn.evonorm import EvoNormB0, EvoNormS0
from sphereopt.nn.filter_response import TLU, FilterResponseNorm2d
from sphereopt.nn.group_norm import GroupNorm
from sphereopt.nn.rectifiers import ScaledReLU
from sphereopt.nn.skip_init import SkipInit
from sphereopt.nn.variance_norm import VarianceNorm2d
from sphereopt.nn.weights import scaled_weight_standardization, weight_norm

#: Channels per group, of GroupNorm and EvoNorm-S0.
GROUP = 8


def after(norm: Callable[[int], nn.Module]) -> Callable[[nn.Conv2d], list[nn.Module]]:
    """Return layer makers: convolution, norm of its width, ReLU."""
    return lambda conv: [conv, norm(conv.out_channels), nn.ReLU()]


#: Name -> what to make of a convolution: the layers of one block.
BLOCKS: dict[str, Callable[[nn.Conv2d], list[nn.Module]]] = {
    "none": lambda conv: [conv, nn.ReLU()],
    "BatchNorm": after(nn.BatchNorm2d),
    "LayerNorm": after(lambda width: GroupNorm(width, groups=1)),
    "InstanceNorm": after(lambda width: GroupNorm(width, group_size=1)),
    "GroupNorm": after(lambda width: GroupNorm(width, group_size=GROUP)),
    "VarianceNorm": after(VarianceNorm2d),
    "FilterResponseNorm": lambda conv: [
        conv,
        FilterResponseNorm2d(conv.out_channels),
        TLU(conv.out_channels),
    ],
    "EvoNorm-S0": lambda conv: [conv, EvoNormS0(conv.out_channels, conv.out_channels // GROUP)],
    "EvoNorm-B0": lambda conv: [conv, EvoNormB0(conv.out_channels)],
    "weight norm": lambda conv: [weight_norm(conv), ScaledReLU()],
    "weight standardization": lambda conv: [scaled_weight_standardization(conv), nn.ReLU()],
}
#: Those that look at activations.
ACTIVATIONS = [name for name in BLOCKS if name != "none" and not name.startswith("weight")]


def images(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return smooth images: noise of a quarter of the resolution, interpolated."""
    coarse = torch.randn(count, 3, size // 4, size // 4, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


class Network(nn.Module):
    """A stack of blocks; ``forward`` returns activations of every block and the loss."""

    def __init__(self, block, depth: int, width: int, residual: bool, skipinit: bool) -> None:
        super().__init__()
        self.residual = residual
        first = [nn.Conv2d(3, width, 3, padding=1, bias=False)] if residual else []
        self.stem = nn.Sequential(*first)
        self.blocks = nn.ModuleList()
        for index in range(depth):
            inputs = 3 if index == 0 and not residual else width
            conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
            tail = [SkipInit()] if skipinit else []
            self.blocks.append(nn.Sequential(*block(conv), *tail))
        for conv in first:
            nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="linear")
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        x = self.stem(x)
        before, activations = [], []
        for block in self.blocks:
            pre = block[0](x)
            before.append(pre)
            y = block[1:](pre)
            x = x + y if self.residual else y
            activations.append(x)
        return before, activations, F.cross_entropy(self.head(x.mean((2, 3))), labels)


def variance(x: Tensor) -> float:
    """Return the variance per channel over batch and positions, mean over channels."""
    return x.var((0, 2, 3)).mean().item()


def gram(x: Tensor) -> Tensor:
    """Return the cosines of all pairs of samples."""
    rows = F.normalize(x.flatten(1), dim=1)
    return rows @ rows.T


def similarity(x: Tensor) -> float:
    """Return the mean cosine of two different samples."""
    return ((gram(x).sum() - len(x)) / (len(x) * (len(x) - 1))).item()


def stable_rank(x: Tensor) -> float:
    """Return the trace of the samples' Gram matrix over its largest eigenvalue."""
    g = gram(x)
    return (g.trace() / torch.linalg.matrix_norm(g, 2)).item()


def run(
    block: Callable[[nn.Conv2d], list[nn.Module]],
    seed: int,
    *,
    residual: bool = False,
    skipinit: bool = False,
    depth: int = 20,
    width: int = 64,
    size: int = 16,
    batch: int = 64,
) -> dict[str, Any]:
    """Return what one network does to one batch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Network(block, depth, width, residual, skipinit)
    x = images(batch, size, generator)
    before, activations, loss = model(x, torch.randint(10, (batch,), generator=generator))
    grads = torch.autograd.grad(loss, before, allow_unused=True)
    with torch.no_grad():
        return {
            "variance": [variance(a) for a in activations],
            "similarity": similarity(activations[-1]),
            "stable rank": stable_rank(activations[-1]),
            "gradient ratio": (grads[0].norm() / grads[-1].norm()).item(),
        }


def mean(block, seeds, **settings) -> dict[str, Any]:
    """Return the mean over seeds; the geometric one of the gradient ratio and the variances."""
    runs = [run(block, seed, **settings) for seed in seeds]
    geometric = statistics.geometric_mean
    return {
        "variance": [geometric(v) for v in zip(*(r["variance"] for r in runs), strict=True)],
        "similarity": statistics.fmean(r["similarity"] for r in runs),
        "stable rank": statistics.fmean(r["stable rank"] for r in runs),
        "gradient ratio": geometric(r["gradient ratio"] for r in runs),
    }


def straightness(values: list[float]) -> float:
    """Return the R² of the best straight line through values over their index."""
    return statistics.correlation(range(len(values)), values) ** 2


def by_size(width: int) -> dict[int, Callable[[nn.Conv2d], list[nn.Module]]]:
    """Return GroupNorm's blocks by channels per group: all powers of two in ``width``."""
    sizes = [2**k for k in range(width.bit_length()) if width % 2**k == 0]
    return {k: after(lambda width, k=k: GroupNorm(width, group_size=k)) for k in sizes}


def saved(layers: nn.Module, x: Tensor) -> int:
    """Return how many tensors of x's size the forward keeps for the backward."""
    kept = {}

    def pack(t: Tensor) -> Tensor:
        if t.numel() == x.numel():
            kept[t.untyped_storage().data_ptr()] = t  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layers(x)
    return len(kept)


def milliseconds(layers: nn.Module, x: Tensor, repeats: int = 25) -> float:
    """Return the processor time of forward and backward, the least of many."""
    grad, times = torch.randn_like(x), []
    for _ in range(repeats):
        start = time.process_time()
        layers(x).backward(grad)
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def costs() -> dict[str, dict[str, float]]:
    """Return time and memory of what follows the convolution, in units of BatchNorm and ReLU."""
    x = torch.randn(32, 64, 32, 32, requires_grad=True)
    names = ["BatchNorm", *(name for name in ACTIVATIONS if name != "BatchNorm")]
    after_conv = {name: nn.Sequential(*BLOCKS[name](nn.Conv2d(3, 64, 3))[1:]) for name in names}
    first = milliseconds(after_conv["BatchNorm"], x)
    return {
        name: {"time": milliseconds(layers, x) / first, "kept": saved(layers, x)}
        for name, layers in after_conv.items()
    }


#: Colour-blind safe (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw similarity and gradient ratio over group size, and variance over depth."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "beyond", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.2, 3.2), layout="constrained")
    sizes = [int(k) for k in found["group size"]]
    for axes, key, title in (
        (left, "similarity", "cosine of two samples, last layer"),
        (middle, "gradient ratio", "gradient norm, first layer over last"),
    ):
        values = [row[key] for row in found["group size"].values()]
        axes.plot(sizes, values, "o-", color=BLUE, label="GroupNorm")
        for name, style in (("BatchNorm", "--"), ("none", ":")):
            axes.axhline(found["plain"][name][key], ls=style, color=GREY, lw=1, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(k) for k in sizes])
        axes.set(xlabel="channels per group", title=title)
        axes.title.set_size(9)
        axes.legend(frameon=False, fontsize=8)
    left.set_ylim(0, 1)
    middle.set_yscale("log")
    middle.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    middle.minorticks_off()
    middle.set_xticks(sizes, [str(k) for k in sizes])
    for name, row in found["residual"].items():
        family = name in ACTIVATIONS
        style = {"color": BLUE if family else ORANGE, "lw": 1.2}
        label = {"BatchNorm": "of activations (8)", "none": "none and of weights (3)"}.get(name)
        right.plot(range(1, len(row["variance"]) + 1), row["variance"], label=label, **style)
    skip = found["skipinit"]["none"]["variance"]
    right.plot(range(1, len(skip) + 1), skip, color=GREEN, ls="--", label="none, SkipInit")
    right.set(yscale="log", xlabel="residual block", title="variance of activations")
    right.title.set_size(9)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--draw", type=Path, help="only draw the results in this file")
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.draw.read_text())["results"], args.draw.with_suffix(".svg"))
        return
    torch.set_num_threads(1)
    seeds, found = range(args.seeds), {}
    found["plain"] = {name: mean(block, seeds) for name, block in BLOCKS.items()}
    found["group size"] = {str(k): mean(block, seeds) for k, block in by_size(64).items()}
    found["residual"] = {name: mean(block, seeds, residual=True) for name, block in BLOCKS.items()}
    for row in found["residual"].values():
        row["straight"] = straightness(row["variance"])
        row["straight log"] = straightness([torch.tensor(v).log().item() for v in row["variance"]])
    found["skipinit"] = {
        # Branches that start at nothing have no gradient: only the variance means something.
        name: {"variance": mean(BLOCKS[name], seeds, residual=True, skipinit=True)["variance"]}
        for name in ("none", "weight norm", "weight standardization")
    }
    cost = costs()
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "torch": torch.__version__,
        "seeds": args.seeds,
        "network": "20 convolutions of width 64, images 16x16, batch 64, groups of 8 channels",
        "cost": "forward and backward of (32, 64, 32, 32) in float32, one thread",
        "command": "python benchmarks/beyond_batchnorm.py",
    }
    print(cost)
    for part, rows in found.items():
        for name, row in rows.items():
            print(
                part, name, {k: v for k, v in row.items() if k != "variance"}, row["variance"][-1]
            )
    if args.write:
        args.write.write_text(
            json.dumps({"about": about, "cost": cost, "results": found}, indent=1) + "\n"
        )
        draw(found, args.write.with_suffix(".svg"))


if __name__ == "__main__":
    main()
