"""Time of one optimizer step as a ratio to torch's, peers interleaved in one run.

    python benchmarks/step_time.py [--rounds 15] [--threads 1] [--json out.json]

Each round times every contestant once, there and back again (A B C C B A); a row is the median over
rounds of the ratio to ``torch.optim``'s own step of the same family (fused, where there is one) in
the same round.
"""

import argparse
import gc
import json
import platform
import statistics
import time

import geoopt
import torch
from torch import nn

import sphereopt as so


def resnet18() -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-18's convolutions."""
    shapes = [(64, 3, 7, 7)]
    for width, before in ((64, 64), (128, 64), (256, 128), (512, 256)):
        shapes += [(width, before, 3, 3), *[(width, width, 3, 3)] * 3]
        shapes += [(width, before, 1, 1)] if width != before else []
    return shapes


WORKLOADS = {
    "many tiny (200 of 64x64)": ([(64, 64)] * 200, "row"),
    "small net (8x1x3x3 ... 32x32x3x3)": ([(16, 1, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3)], "row"),
    "ResNet-18 filters (11M)": (resnet18(), "row"),
    "transformer matrices (8 of 768x3072)": ([(768, 3072), (3072, 768)] * 4, "tensor"),
}


def contestants(family: str, sphere: str):
    """Return name -> function of parameters that returns an optimizer."""
    geo = {"stabilize": None}
    if family == "sgd":
        options = {"lr": 1e-3, "momentum": 0.9}
        return {
            "torch fused": lambda p: torch.optim.SGD(p, **options, fused=True),
            "torch default": lambda p: torch.optim.SGD(p, **options),
            "SphereSGD fixed": lambda p: so.SphereSGD(p, **options, sphere=sphere),
            "SphereSGD fixed, transport": lambda p: so.SphereSGD(
                p, **options, sphere=sphere, transport="project"
            ),
            "SphereSGD free": lambda p: so.SphereSGD(p, **options, sphere=sphere, radius="free"),
            "geoopt RiemannianSGD": lambda p: geoopt.optim.RiemannianSGD(
                on_sphere(p, sphere), **options, **geo
            ),
        }
    options = {"lr": 1e-3}
    if family == "muon":
        return {
            "torch Muon": lambda p: torch.optim.Muon(p, **options),
            "SphereMuon fixed": lambda p: so.SphereMuon(p, **options, sphere=sphere),
        }
    return {
        "torch fused": lambda p: torch.optim.AdamW(p, **options, fused=True),
        "torch default": lambda p: torch.optim.AdamW(p, **options),
        "SphereAdam fixed": lambda p: so.SphereAdam(p, **options, sphere=sphere),
        "SphereAdam fixed, transport": lambda p: so.SphereAdam(
            p, **options, sphere=sphere, transport="project"
        ),
        "SphereAdam fixed, second_moment=sphere": lambda p: so.SphereAdam(
            p, **options, sphere=sphere, second_moment="sphere"
        ),
        "torch fused, constrained": lambda p: constrained(p, sphere, **options),
        "SphereLion fixed": lambda p: so.SphereLion(p, **options, sphere=sphere),
        "SphereAdam free": lambda p: so.SphereAdam(p, **options, sphere=sphere, radius="free"),
        "geoopt RiemannianAdam": lambda p: geoopt.optim.RiemannianAdam(
            on_sphere(p, sphere), **options, **geo
        ),
    }


def constrained(params: list[nn.Parameter], sphere: str, **options) -> torch.optim.Optimizer:
    """Return torch's fused AdamW held on spheres by step hooks."""
    named = [(str(i), p) for i, p in enumerate(params)]
    optimizer = torch.optim.AdamW(named, **options, fused=True, weight_decay=0.0)
    so.constrain(optimizer, {name: sphere for name, _ in named}, project=False)
    return optimizer


def on_sphere(params: list[nn.Parameter], sphere: str) -> list[nn.Parameter]:
    """Return unit rows as geoopt wants them: the sphere is the last axis."""
    rows = [p.detach().flatten(1) if sphere == "row" else p.detach().flatten() for p in params]
    result = []
    for row in rows:
        q = geoopt.ManifoldParameter(row / row.norm(dim=-1, keepdim=True), geoopt.Sphere())
        q.grad = torch.randn_like(q)
        result.append(q)
    return result


def timed(optimizer: torch.optim.Optimizer, repeats: int) -> float:
    """Return seconds per step."""
    start = time.perf_counter()
    for _ in range(repeats):
        optimizer.step()
    return (time.perf_counter() - start) / repeats


def measure(family: str, shapes, sphere: str, rounds: int):
    """Return name -> (median ratio to the first, median milliseconds)."""
    entries = {}
    for name, make in contestants(family, sphere).items():
        params = [nn.Parameter(torch.randn(s)) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        entries[name] = make(params)
        entries[name].step()
    seconds = {name: [] for name in entries}
    first = next(iter(entries))
    repeats = max(1, int(0.02 / timed(entries[first], 3)))
    gc.disable()
    for _ in range(rounds):
        order = list(entries)
        once = dict.fromkeys(order, 0.0)
        for name in order + order[::-1]:
            once[name] += timed(entries[name], repeats) / 2
        for name, value in once.items():
            seconds[name].append(value)
    gc.enable()
    base = seconds[first]
    return {
        name: (
            statistics.median(x / y for x, y in zip(values, base, strict=True)),
            1e3 * statistics.median(values),
        )
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="part of a workload's name")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for workload, (shapes, sphere) in WORKLOADS.items():
        if args.only not in workload:
            continue
        for family in ("sgd", "adam", "muon"):
            if family == "muon" and any(len(shape) != 2 for shape in shapes):
                continue  # torch's takes matrices only
            print(f"\n{workload}, spheres: {sphere}, {family}")
            found = measure(family, shapes, sphere, args.rounds)
            results[f"{workload} / {family}"] = found
            for name, (ratio, ms) in found.items():
                print(f"  {name:32s} {ratio:6.2f} x   {ms:9.3f} ms")
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {args.threads} thread(s)",
            "torch": torch.__version__,
            "geoopt": geoopt.__version__,
            "python": platform.python_version(),
        }
        with open(args.json, "w") as file:
            json.dump({"about": about, "ratio and ms": results}, file, indent=1)


if __name__ == "__main__":
    main()
