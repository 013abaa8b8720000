"""Models and other things for ``sphereopt audit`` to import."""

import torch
from torch import nn

print("imported")  # must not get into the JSON


def factory(classes=2, mode="sum"):
    return nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, classes)
    )


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 11, bias=False)

    def forward(self, ids, scale=None, mode="plain"):
        assert mode in ("plain", "2x2")
        x = self.norm(self.embed(ids))
        return self.head(x if scale is None else x * scale)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = factory()
        self.gate = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.body(x) * self.gate.detach()


class Tied(Language):
    def __init__(self):
        super().__init__()
        self.head.weight = self.embed.weight


class Spaces:
    instance = factory(3)


def shapeless():
    raise RuntimeError("no shape\n    given")


number = 3


def text():
    return "a model"
