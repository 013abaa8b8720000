"""Two processes that train together and log: run by test_monitor_tracker.py, one call per rank."""

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sphereopt as so

SPHERES = {"0.weight": "row", "2.weight": "tensor", "4.weight": "block:3"}


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 7, bias=False), nn.ReLU(),
        nn.Linear(7, 9, bias=False),
    ).double()  # fmt: skip


def batch(step, rank=None):
    """Return all inputs of a step, or those of one rank."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x if rank is None else x[4 * rank : 4 * rank + 4]


def train(net, optimizer, tracker, rank=None):
    for step in range(6):
        optimizer.zero_grad()
        loss = net(batch(step, rank)).square().mean()
        loss.backward()
        tracker.log(loss=loss)
        optimizer.step()


def main(kind, rank, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    net = model()
    if kind == "fsdp2":
        # Groups first: shards have other shapes, which the specs do not fit.
        groups = so.param_groups(net, SPHERES)
        fully_shard(net)
        now = dict(net.named_parameters())
        groups = [{**g, "params": [(n, now[n]) for n, _ in g["params"]]} for g in groups]
    else:
        groups = so.param_groups(net, SPHERES)
        net = DistributedDataParallel(net)
    make = so.SphereAdam if kind == "ours" else torch.optim.AdamW
    optimizer = make(groups, lr=0.01)
    with so.track(optimizer, Path(folder) / "run.jsonl", every=2, window=2) as tracker:
        train(net, optimizer, tracker, rank)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
