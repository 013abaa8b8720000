"""A network with spheres of both kinds, and a few steps of training."""

import torch
from torch import nn

import sphereopt as so


def model_and_groups():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4)
    )
    specs = {"0.weight": "row", ("3.weight", "3.bias"): "tensor"}
    return model, so.param_groups(model, specs)


def train_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(16, 6)).pow(4).mean().backward()
    optimizer.step()


def continue_training(model, optimizer, steps):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 6, generator=generator)).pow(4).mean().backward()
        optimizer.step()


def run(optimizer, params, grads):
    for g in grads:
        for p, x in zip(params, g, strict=True):
            p.grad = None if x is None else x.clone()
        optimizer.step()
