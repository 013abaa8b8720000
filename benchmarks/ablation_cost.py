"""What projection, transport and the move cost: processor time and operations of one step.

    python benchmarks/ablation_cost.py [--rounds 15] [--json docs/results/ablation.json]

Each round times every contestant once, there and back again (A B C C B A); a row is the median over
rounds of the ratio to ``transport="none"`` in the same round. The figures are put beside the runs
of ``ablation.py``.
"""

import argparse
import gc
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from ablation import CENTRE_MOVE, Results, machine
from ablation_tasks import CHANNELS, WIDTH
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sphereopt as so

SMALL = [(CHANNELS[0], 1, 3, 3), *((b, a, 3, 3) for a, b in pairwise(CHANNELS))]
LARGE = [(16 * WIDTH, 16 * WIDTH)] * 4
WORKLOADS = {
    "filters of the BatchNorm network (23 thousand entries)": (SMALL, "row"),
    "four matrices of 1024x1024 (4 million entries)": (LARGE, "tensor"),
}


class Count(TorchDispatchMode):
    """Counts the operations that reach a kernel, views included."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def contestants(family):
    """Return name -> options of the sphere optimizer; the first is what the others are held to."""
    middle = CENTRE_MOVE[family]
    found = {f"{middle}, none": {"move": middle, "transport": "none"}}
    for how in ("project", "parallel", "rescale"):
        found[f"{middle}, {how}"] = {"move": middle, "transport": how}
    for move in so.moves.MOVES:
        found[f"{move}, none"] = {"move": move, "transport": "none"}
        found[f"{move}, project"] = {"move": move, "transport": "project"}
    return found


def optimizer(family, shapes, sphere, options):
    """Return an optimizer that has made two steps on random weights with random gradients."""
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    if family == "sgd":
        made = so.SphereSGD(params, lr=1e-3, momentum=0.9, sphere=sphere, **options)
    else:
        made = so.SphereAdam(params, lr=1e-3, sphere=sphere, **options)
    made.step()
    made.step()
    return made


def timed(opt, repeats):
    """Return seconds of processor time per step: other work on the machine does not count."""
    start = time.process_time()
    for _ in range(repeats):
        opt.step()
    return (time.process_time() - start) / repeats


def measure(family, shapes, sphere, rounds):
    """Return name -> ratio of times and number of operations."""
    made = {k: optimizer(family, shapes, sphere, o) for k, o in contestants(family).items()}
    first = next(iter(made))
    repeats = max(1, int(0.02 / timed(made[first], 3)))
    ratios = {name: [] for name in made}
    gc.disable()
    for _ in range(rounds):
        seconds = dict.fromkeys(made, 0.0)
        for name in [*made, *reversed(made)]:
            seconds[name] += timed(made[name], repeats)
        for name, value in seconds.items():
            ratios[name].append(value / seconds[first])
    gc.enable()
    result = {}
    for name, opt in made.items():
        with Count() as count:
            opt.step()
        ratio = round(statistics.median(ratios[name]), 3)
        result[name] = {"ratio": ratio, "operations": count.number}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path("docs/results/ablation.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cost = {}
    for workload, (shapes, sphere) in WORKLOADS.items():
        for family, name in (("sgd", "SphereSGD"), ("adam", "SphereAdam")):
            cost[f"{name}, {workload}"] = measure(family, shapes, sphere, args.rounds)
    print(json.dumps(cost, indent=1))
    results = Results(args.json, machine())
    results.content["cost"] = cost
    results.save()


if __name__ == "__main__":
    main()
