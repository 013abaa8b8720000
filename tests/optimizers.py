"""The table of optimizers that every generic test runs over: a new optimizer is one more row."""

from dataclasses import dataclass, field
from typing import Any

import torch
from reference import plain

import sphereopt as so


@dataclass(frozen=True)
class Row:
    """An optimizer, options to run it with, and the torch optimizer it stands in for."""

    name: str
    cls: type[so.SphereOptimizer]
    torch_cls: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    torch_only: dict[str, Any] = field(default_factory=dict)
    ours_only: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.05
    free: bool = True  # whether radius="free" reproduces torch_cls
    entrywise: bool = True  # whether entries of different rows do not see each other

    def __str__(self) -> str:
        return self.name

    def make(self, params: Any, **more: Any) -> so.SphereOptimizer:
        return self.cls(params, **{"lr": self.lr, **self.options, **self.ours_only, **more})

    def make_torch(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        options = {"lr": self.lr, **self.options, **self.torch_only, **more}
        return self.torch_cls(params, **options)


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW

ROWS = [
    Row("sgd", so.SphereSGD, SGD, {}),
    Row("sgd-momentum", so.SphereSGD, SGD, {"momentum": 0.9}),
    Row("sgd-dampening", so.SphereSGD, SGD, {"momentum": 0.9, "dampening": 0.3}),
    Row("sgd-nesterov", so.SphereSGD, SGD, {"momentum": 0.9, "nesterov": True}),
    Row("sgd-maximize", so.SphereSGD, SGD, {"momentum": 0.5, "maximize": True}, lr=0.01),
    Row("adamw", so.SphereAdam, ADAMW, {}, lr=0.01),
    Row("adamw-amsgrad", so.SphereAdam, ADAMW, {"amsgrad": True, "betas": (0.8, 0.95)}, lr=0.01),
    Row("adamw-maximize", so.SphereAdam, ADAMW, {"maximize": True, "eps": 1e-6}, lr=0.003),
    Row("adamw-sphere", so.SphereAdam, ADAMW, {}, {}, {"second_moment": "sphere"}, 0.01, False),
    Row("adam-l2", so.SphereAdam, ADAM, {}, {}, {"decoupled_weight_decay": False}, lr=0.01),
    Row("lion", so.SphereLion, plain.Lion, {}, lr=0.003),
    Row(
        "lion-maximize",
        so.SphereLion,
        plain.Lion,
        {"betas": (0.8, 0.9), "maximize": True},
        lr=0.001,
    ),
    Row("muon", so.SphereMuon, plain.Muon, {}, lr=0.01, entrywise=False),
    Row(
        "muon-heavy",
        so.SphereMuon,
        plain.Muon,
        {"nesterov": False, "momentum": 0.8, "adjust_lr_fn": "match_rms_adamw", "maximize": True},
        lr=0.003,
        entrywise=False,
    ),
]
