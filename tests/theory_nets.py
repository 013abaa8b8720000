"""Two exactly scale-invariant networks on scikit-learn's digits, and real optimizers for them."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import sphereopt as so

WIDTH = 24


@cache
def digits():
    data = load_digits()
    return torch.tensor(data.data / 16.0), torch.tensor(data.target)


def network(kind, seed=0):
    """Return a network in float64 and its spheres; eps is nothing, so that they are exact."""
    torch.manual_seed(seed)
    norm = {"bn": nn.BatchNorm1d, "ln": nn.LayerNorm}[kind]
    layers = []
    for before in (64, WIDTH):
        linear = nn.Linear(before, WIDTH, bias=False)
        layers += [linear, norm(WIDTH, eps=1e-30), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10)).double()
    return model, dict.fromkeys(("0.weight", "3.weight"), {"bn": "row", "ln": "tensor"}[kind])


def batches(steps, size=32, seed=0):
    """Yield random batches in which a fifth of the labels are wrong, so that noise stays."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randint(len(x), (size,), generator=generator)
        wrong = torch.randint(10, (size,), generator=generator)
        noisy = torch.rand(size, generator=generator) < 0.2
        yield x[pick], torch.where(noisy, wrong, y[pick])


def make(name, params, **hyper):
    """Return a real optimizer; its caller decays the weights of sgdw."""
    if name in ("sgd", "sgdw"):
        hyper = {**hyper, "weight_decay": 0.0} if name == "sgdw" else hyper
        return torch.optim.SGD(params, **hyper)
    if name in ("adam", "adamw"):
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](params, **hyper)
    if name == "muon":
        hyper.pop("shape", None)
        return torch.optim.Muon(params, **hyper)
    momentum = hyper.pop("momentum", 0.0)
    hyper = hyper if name == "lion" else {**hyper, "betas": (momentum, momentum)}
    return so.SphereLion(params, **hyper)


def train(name, kind, lrs, decays, *, scales=None, weights=1.0, buffer=None, seed=0, **hyper):
    """Train the invariant weights; yield them after every step.

    Args:
        name: Optimizer of the invariant weights; all others have plain SGD.
        kind: ``"bn"`` or ``"ln"``.
        lrs: Learning rate of every step.
        decays: Weight decay of every step.
        scales: What gradients are multiplied by at every step.
        weights: What the invariant weights are multiplied by at the start.
        buffer: The momentum buffers are this times the weights at the start.
        seed: Of network and batches.
        **hyper: Of the optimizer.
    """
    model, spheres = network(kind, seed)
    named = dict(model.named_parameters())
    invariant = [named[n] for n in spheres]
    others = torch.optim.SGD([p for n, p in named.items() if n not in spheres], lr=0.05)
    with torch.no_grad():
        for w in invariant:
            w.mul_(weights)
    optimizer = make(name, invariant, lr=1.0, weight_decay=0.0, **hyper)
    if buffer is not None:
        for w in invariant:
            optimizer.state[w]["momentum_buffer"] = buffer * w.detach()
    for t, (x, y) in enumerate(batches(len(lrs), seed=seed)):
        optimizer.param_groups[0].update(lr=float(lrs[t]))
        if name != "sgdw":
            optimizer.param_groups[0].update(weight_decay=float(decays[t]))
        optimizer.zero_grad()
        others.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for w in invariant:
                if scales is not None:
                    w.grad.mul_(float(scales[t]))
                if name == "sgdw":
                    w.mul_(1 - float(lrs[t]) * float(decays[t]))
        optimizer.step()
        others.step()
        yield [w.detach().clone() for w in invariant]


def unit(weights, kind):
    """Return the directions of all spheres."""
    dims = 1 if kind == "bn" else (0, 1)
    return [w / w.norm(dim=dims, keepdim=True) for w in weights]


def apart(run, other, kind):
    """Return the largest distance between directions of two runs, at any step, on any sphere."""
    dims = 1 if kind == "bn" else (0, 1)
    worst = 0.0
    for ours, theirs in zip(run, other, strict=True):
        for u, v in zip(unit(ours, kind), unit(theirs, kind), strict=True):
            worst = max(worst, (u - v).norm(dim=dims).max().item())
    return worst
