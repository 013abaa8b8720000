"""The tasks of ``ablation.py``: two small networks whose weights are proved to be on spheres, and
one that is put on spheres by choice, with their data.
"""

import gzip
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import sphereopt as so
from sphereopt.train.data import load

HEADS, WIDTH, DEPTH, CONTEXT = 4, 64, 2, 64
CHANNELS = (16, 32, 64)
HELD_OUT = 4096


def rotary(x: Tensor) -> Tensor:
    """Turn pairs of features ``(..., time, heads, n)`` by angles in proportion to time."""
    half = x.shape[-1] // 2
    rates = 100.0 ** -(torch.arange(half, device=x.device) / half)
    turn = torch.arange(x.shape[-3], device=x.device)[:, None, None] * rates
    first, second = x.split(half, -1)
    return torch.cat(
        [first * turn.cos() - second * turn.sin(), first * turn.sin() + second * turn.cos()], -1
    )


class Block(nn.Module):
    """Attention and an MLP, each behind an RMSNorm.

    With ``inner`` the queries, the keys and both outputs are normalized too. Then every matrix is
    scale-invariant; the MLP's two are because ReLU lets a positive factor through.
    """

    def __init__(self, inner: bool) -> None:
        super().__init__()
        norm = nn.RMSNorm if inner else nn.Identity
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.key, self.value, self.out = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.query_norm, self.key_norm = norm(WIDTH // HEADS), norm(WIDTH // HEADS)
        self.out_norm, self.down_norm = norm(WIDTH), norm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)) for f in (self.query, self.key, self.value))
        q, k = rotary(self.query_norm(q)), rotary(self.key_norm(k))
        heads = functional.scaled_dot_product_attention(
            *(z.transpose(1, 2) for z in (q, k, v)), is_causal=True
        )
        x = x + self.out_norm(self.out(heads.transpose(1, 2).flatten(2)))
        return x + self.down_norm(self.down(functional.relu(self.up(self.norm2(x)))))


class CharGPT(nn.Module):
    """A transformer over characters."""

    def __init__(self, letters: int, inner: bool) -> None:
        super().__init__()
        self.token = nn.Embedding(letters, WIDTH)
        self.blocks = nn.Sequential(*(Block(inner) for _ in range(DEPTH)))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, letters, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(ids))))


def conv_net(channels: int, classes: int) -> nn.Sequential:
    """Return three strided convolutions with BatchNorm, whose filters are scale-invariant."""
    layers: list[nn.Module] = []
    before = channels
    for width in CHANNELS:
        layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    head = nn.Linear(before, classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


@dataclass(frozen=True)
class Task:
    """What is trained, on what.

    Attributes:
        family: ``"sgd"`` or ``"adam"``.
        data: Name of the data.
        build: Returns the untrained model; its weights come from torch's generator.
        train: Inputs and targets to draw from.
        held_out: Inputs and targets to measure on.
        by_choice: The matrices of all blocks are put on spheres though their norm matters.
        steps: Length of a run.
        batch: Examples of a step.
        ordinary_lr: Peak learning rate of all that is on no sphere, in every arm.
    """

    family: str
    data: str
    build: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    by_choice: bool
    steps: int
    batch: int
    ordinary_lr: float

    def model(self, seed: int) -> nn.Module:
        """Return the untrained model of this seed."""
        torch.manual_seed(seed)
        return self.build()

    def groups(self, model: nn.Module) -> list[dict]:
        """Return parameter groups with the spheres that are proved, or put on by choice."""
        if self.by_choice:
            return so.param_groups(
                model, {}, constrain=lambda name, p: name.startswith("blocks.") and p.ndim > 1
            )
        return so.param_groups(model, so.find_spheres(model, self.train[0][:2]))

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a random batch."""
        index = torch.randint(len(self.train[0]), (self.batch,), generator=generator)
        return self.train[0][index], self.train[1][index]

    def setup(self) -> dict[str, object]:
        """Return what a figure of this task depends on, as plain values."""
        model = self.model(0)
        on_spheres = [g for g in self.groups(model) if g["sphere"] is not None]
        matrices = [p for p in model.parameters() if p.ndim > 1]
        return {
            "data": self.data,
            "family": self.family,
            "steps": self.steps,
            "batch": self.batch,
            "ordinary lr": self.ordinary_lr,
            "parameters": sum(p.numel() for p in model.parameters()),
            "matrices": len(matrices),
            "on spheres": {
                f"{g['sphere']}, {'jointly, ' * g['joint']}{g['kind']}": [n for n, _ in g["params"]]
                for g in on_spheres
            },
            "entries on spheres": sum(p.numel() for g in on_spheres for _, p in g["params"]),
        }


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy, in nats per example or character."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


@torch.no_grad()
def measure(model: nn.Module, task: Task) -> tuple[float, float]:
    """Return loss and accuracy on the held-out examples."""
    model.eval()
    total = right = count = 0.0
    for inputs, targets in zip(*(x.split(512) for x in task.held_out), strict=True):
        total += loss(model, (inputs, targets)).item() * targets.numel()
        right += (model(inputs).argmax(-1) == targets).sum().item()
        count += targets.numel()
    return total / count, right / count


@cache
def images(source: str) -> tuple[str, int, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return name, number of classes, training and held-out images with labels."""
    found = load(source)
    size, dtype = found.train_images.shape[-1], torch.float32
    train = found.normalized(found.train_images, dtype), found.train_labels
    test = found.normalized(found.test_images, dtype), found.test_labels
    held_out = test[0][:HELD_OUT], test[1][:HELD_OUT]
    name = "digits" if source == "digits" else Path(source).name
    return f"{name}, {size}x{size}", found.classes, train, held_out


@cache
def text(source: str) -> tuple[str, int, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return name, alphabet's size, all training windows and some held-out ones, with targets."""
    if source:
        path = Path(source)
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        name = f"{path.parent.name}/{path.name}"
    else:
        folder = Path(sysconfig.get_path("stdlib"))
        raw = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        raw, name = bytes(c for c in raw if c < 128), "source of Python's standard library"
    letters, codes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).unique(return_inverse=True)
    cut = len(codes) * 9 // 10
    train = codes[:cut].unfold(0, CONTEXT + 1, 1)
    held_out = codes[cut:].unfold(0, CONTEXT + 1, CONTEXT)[: HELD_OUT // 8]
    pairs = [(windows[:, :-1], windows[:, 1:]) for windows in (train, held_out)]
    return name, len(letters), pairs[0], pairs[1]


def make(name: str, data: str, corpus: str) -> Task:
    """Return a task by name.

    Args:
        name: A key of ``TASKS``.
        data: Images, as ``sphereopt train --data`` takes them.
        corpus: A text file, or "" for the source of Python's standard library.
    """
    network, family = name.split("-")
    steps, batch, ordinary_lr = TASKS[name]
    if network in ("conv", "digits"):
        source = "digits" if network == "digits" else data
        about, classes, train, held_out = images(source)

        def build() -> nn.Module:
            return conv_net(train[0].shape[1], classes)
    else:
        about, letters, train, held_out = text(corpus)

        def build() -> nn.Module:
            return CharGPT(letters, inner=network == "gpt")

    by_choice = network == "plain"
    return Task(family, about, build, train, held_out, by_choice, steps, batch, ordinary_lr)


#: Name -> steps, batch, peak lr of what is on no sphere (torch's best, from a search by factors 3).
TASKS = {
    "conv-sgd": (800, 32, 0.3),
    "digits-sgd": (400, 32, 0.3),
    "gpt-adam": (400, 8, 1e-2),
    "conv-adam": (800, 32, 3e-2),
    "plain-adam": (400, 8, 1e-2),
}
