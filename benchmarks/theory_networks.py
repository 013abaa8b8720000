"""Norm and angle of real weights against the theory's, on three small networks.

    python benchmarks/theory_networks.py --write docs/results/theory_networks.json

A network with BatchNorm and one with LayerNorm learn scikit-learn's digits, one with normalized
queries and keys the characters of the standard library's source. Every weight that ``find_spheres``
proves to be scale-invariant is measured at every step, in float32, with the norm layers' own eps.
The theory is given the settings, the norm at the start, and the size of the gradients, measured in
the same run; it sees no weights and no angles.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import sphereopt as so
from sphereopt.geometry import angle, norm
from sphereopt.theory import equilibrium, schedule, trajectory

WRONG = 0.3  # share of labels that are wrong: the noise that never ends
WIDTH, HEADS, CONTEXT = 32, 2, 32
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """An optimizer and its settings."""

    label: str
    optimizer: str
    lr: float
    weight_decay: float
    hyper: Mapping[str, Any] = field(default_factory=dict)


#: All forget their directions in some 1000 steps.
CASES = (
    Case("SGD", "sgd", 0.1, 0.01),
    Case("SGD, momentum 0.9", "sgd", 0.1, 1e-3, {"momentum": 0.9}),
    Case("Nesterov 0.9", "sgd", 0.1, 1e-3, {"momentum": 0.9, "nesterov": True}),
    Case("SGDW 0.9", "sgdw", 0.01, 0.1, {"momentum": 0.9}),
    Case("AdamW (0.9, 0.95)", "adamw", 4.5e-3, 0.22, {"betas": (0.9, 0.95)}),
    Case("AdamW (0.9, 0.999)", "adamw", 4.5e-3, 0.22, {"betas": (0.9, 0.999)}),
    Case("Adam + L2", "adam", 3e-3, 2e-3, {"betas": (0.9, 0.99)}),
    Case("Lion", "lion", 6.6e-4, 1.5, {"betas": (0.9, 0.99)}),
    Case("Muon", "muon", 4.5e-3, 0.22, {"adjust_lr_fn": "match_rms_adamw"}),
)


class Attention(nn.Module):
    """One layer of attention with normalized queries, keys and output, over characters."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.norm, self.out_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.key, self.value, self.out = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.query_norm, self.key_norm = (nn.RMSNorm(WIDTH // HEADS) for _ in range(2))
        self.head = nn.Linear(WIDTH, letters)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place.weight
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)) for f in (self.query, self.key, self.value))
        heads = functional.scaled_dot_product_attention(
            self.query_norm(q).transpose(1, 2),
            self.key_norm(k).transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
        )
        return self.head(x + self.out_norm(self.out(heads.transpose(1, 2).flatten(2))))


def perceptron(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (64, WIDTH):
        layers += [nn.Linear(before, WIDTH, bias=False), norm(WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


@cache
def digits() -> Batch:
    data = load_digits()
    x = torch.tensor(data.data / 16.0, dtype=torch.float32)
    # Pixel by pixel, with a floor for those that are nearly always blank.
    return (x - x.mean(0)) / (x.std(0) + 0.1), torch.tensor(data.target)


@cache
def text(source: str) -> tuple[int, Tensor]:
    """Return the size of the alphabet and all windows of a text, one letter more than the input."""
    paths = [Path(source)] if source else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    raw = bytes(c for path in paths[:60] for c in path.read_bytes() if c < 128)
    letters, codes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).unique(return_inverse=True)
    return len(letters), codes.unfold(0, CONTEXT + 1, 1)


NETWORKS = ("BatchNorm", "LayerNorm", "QK-norm")


def build(
    name: str, seed: int, source: str = "", size: int = 16
) -> tuple[nn.Module, Iterator[Batch]]:
    """Return an untrained network and endless batches for it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    if name == "QK-norm":
        letters, windows = text(source)
        model: nn.Module = Attention(letters)

        def draw() -> Batch:
            picked = windows[torch.randint(len(windows), (size // 2,), generator=generator)]
            return picked[:, :-1], spoiled(picked[:, 1:], letters, generator)
    else:
        model = perceptron({"BatchNorm": nn.BatchNorm1d, "LayerNorm": nn.LayerNorm}[name])
        x, y = digits()

        def draw() -> Batch:
            pick = torch.randint(len(x), (size,), generator=generator)
            return x[pick], spoiled(y[pick], 10, generator)

    return model, iter(draw, None)


def spoiled(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    wrong = torch.randint(classes, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < WRONG, wrong, labels)


def make(case: Case, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the real optimizer; the caller decays the weights of SGDW."""
    given = {"lr": case.lr, "weight_decay": case.weight_decay, **case.hyper}
    if case.optimizer == "sgdw":
        given["weight_decay"] = 0.0
    kinds = {"sgd": torch.optim.SGD, "sgdw": torch.optim.SGD, "adam": torch.optim.Adam}
    kinds |= {"adamw": torch.optim.AdamW, "lion": so.SphereLion, "muon": torch.optim.Muon}
    return kinds[case.optimizer](params, **given)


@dataclass(frozen=True)
class Spheres:
    """What was measured of the spheres of one weight.

    Attributes:
        name: Of the weight.
        shape: Of one sphere, as a matrix.
        start: Norms before the first step, (spheres,).
        norm: Norms after each step, (steps, spheres).
        angle: Angles of each step, (steps, spheres).
        gradient: Norm of the gradient times norm before each step, (steps, spheres).
    """

    name: str
    shape: tuple[int, int]
    start: np.ndarray
    norm: np.ndarray
    angle: np.ndarray
    gradient: np.ndarray


def train(name: str, case: Case, rates: np.ndarray, seed: int, source: str = "") -> list[Spheres]:
    """Train with the proved spheres under an optimizer and all else under plain SGD."""
    model, batches = build(name, seed, source)
    report = so.find_spheres(model, next(batches)[0])
    named = dict(model.named_parameters())
    found = {n: s for n, s in report.spheres.items() if isinstance(n, str) and named[n].ndim == 2}
    if case.optimizer == "muon":
        # One momentum and one step per matrix: a sphere must be a whole one.
        found = {n: s for n, s in found.items() if s == "tensor"}
    optimizer = make(case, [named[n] for n in found])
    others = torch.optim.SGD([p for n, p in named.items() if n not in found], lr=0.03)
    log: dict[str, list[tuple[np.ndarray, ...]]] = {n: [] for n in found}
    for rate, (x, y) in zip(rates.tolist(), batches, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        model.zero_grad()
        functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        before = {n: named[n].detach().clone() for n in found}
        sizes = {n: norm(before[n], s) * norm(named[n].grad, s) for n, s in found.items()}
        if case.optimizer == "sgdw":
            with torch.no_grad():
                for n in found:
                    named[n].mul_(1 - rate * case.weight_decay)
        optimizer.step()
        others.step()
        for n, s in found.items():
            w = named[n].detach()
            row = (norm(before[n], s), norm(w, s), angle(before[n], w, s), sizes[n])
            log[n].append(tuple(value.numpy() for value in row))
    return [spheres(n, named[n], rows) for n, rows in log.items()]


def spheres(name: str, w: Tensor, rows: list[tuple[np.ndarray, ...]]) -> Spheres:
    before, after, turned, gradient = (np.array(column) for column in zip(*rows, strict=True))
    shape = (w.shape[0] // before.shape[1], w.shape[1])
    return Spheres(name, shape, before[0], after, turned, gradient)


def options(case: Case, shape: tuple[int, int]) -> dict[str, Any]:
    own = {"shape": shape} if case.optimizer == "muon" else {}
    return {"dim": shape[0] * shape[1], **case.hyper, **own}


def rms(x: np.ndarray) -> float:
    return math.sqrt(float(np.mean(np.square(x))))


def at_equilibrium(case: Case, seen: Spheres, skip: int) -> dict[str, Any]:
    """Return measured and predicted norm and angle of one weight, over the steps after ``skip``."""
    found = [
        equilibrium(
            case.optimizer,
            lr=case.lr,
            weight_decay=case.weight_decay,
            grad_norm=rms(gradient),
            **options(case, seen.shape),
        )
        for gradient in seen.gradient[skip:].T
    ]
    return {
        "weight": seen.name,
        "spheres": len(found),
        "norm": rms(seen.norm[skip:]),
        "norm predicted": rms(np.array([f.norm for f in found])),
        "angle": rms(seen.angle[skip:]),
        "angle predicted": rms(np.array([f.angle for f in found])),
    }


def averaged(x: np.ndarray, window: int) -> np.ndarray:
    """Return root mean squares over spheres and over windows of steps."""
    square = np.square(x).reshape(len(x), -1).mean(1)
    return np.sqrt(square[: len(x) // window * window].reshape(-1, window).mean(1))


def along_schedule(case: Case, seen: Spheres, rates: np.ndarray, windows: int) -> dict[str, Any]:
    """Return measured and predicted norms and angles of one weight, in windows of the run."""
    window = len(rates) // windows
    kernel = np.ones(window) / window
    norms, angles = [], []
    for start, gradient in zip(seen.start, seen.gradient.T, strict=True):
        # The mean square over a window around each step: the theory wants no single batch.
        padded = np.pad(gradient**2, (window // 2, window - 1 - window // 2), mode="edge")
        run = trajectory(
            case.optimizer,
            lr=rates,
            weight_decay=case.weight_decay,
            norm0=float(start),
            grad_norm=np.sqrt(np.convolve(padded, kernel, "valid")),
            **options(case, seen.shape),
        )
        norms.append(run.norm)
        angles.append(run.angle)
    return {
        "weight": seen.name,
        "norm": averaged(seen.norm, window).tolist(),
        "norm predicted": averaged(np.array(norms).T, window).tolist(),
        "angle": averaged(seen.angle, window).tolist(),
        "angle predicted": averaged(np.array(angles).T, window).tolist(),
    }


def errors(rows: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Return mean and largest |predicted/measured - 1| over weights, and windows if there are."""
    off = np.concatenate(
        [np.abs(np.atleast_1d(r[f"{key} predicted"]) / np.atleast_1d(r[key]) - 1) for r in rows]
    )
    return float(off.mean()), float(off.max())


def compare(name: str, case: Case, steps: int, seed: int, source: str = "") -> dict[str, Any]:
    """Return what was measured and predicted at a constant rate and along warm-up and cosine.

    The former is three times as long, and measured over the last two thirds: at equilibrium the
    angle of a single block still fluctuates by some percent for as long as its memory.
    """
    constant = np.full(3 * steps, case.lr)
    annealed = schedule("cosine", case.lr, steps, warmup=steps // 20, final=0.05)
    settled = train(name, case, constant, seed, source)
    moving = train(name, case, annealed, seed, source)
    still = [at_equilibrium(case, seen, steps) for seen in settled]
    run = [along_schedule(case, seen, annealed, 20) for seen in moving]
    row: dict[str, Any] = {"network": name, "optimizer": case.label, "seed": seed}
    for what, found in (("equilibrium", still), ("schedule", run)):
        for key in ("angle", "norm"):
            mean, worst = errors(found, key)
            row[f"{what}, {key} error"] = {"mean": round(mean, 5), "worst": round(worst, 5)}
    return {**row, "weights": still, "windows": run}


def signals(name: str, steps: int, source: str = "", draws: int = 4000) -> dict[str, float]:
    """Return the size of the mean gradient over that of its noise, after training with AdamW.

    The mean is over batches at the last weights; a momentum that averages n of them leaves of the
    noise the root of 1/n, and of the mean all.
    """
    case = CASES[4]
    model, batches = build(name, 0, source)
    report = so.find_spheres(model, next(batches)[0])
    named = dict(model.named_parameters())
    found = [n for n in report.spheres if isinstance(n, str) and named[n].ndim == 2]
    optimizer = make(case, [named[n] for n in found])
    others = torch.optim.SGD([p for n, p in named.items() if n not in found], lr=0.03)
    sums = {n: torch.zeros_like(named[n]) for n in found}
    squares = dict.fromkeys(found, 0.0)
    for step, (x, y) in zip(range(steps + draws), batches, strict=False):
        model.zero_grad()
        functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        if step < steps:
            optimizer.step()
            others.step()
            continue
        for n in found:
            sums[n] += named[n].grad
            squares[n] += float(named[n].grad.square().sum())
    result = {}
    for n in found:
        total, mean = squares[n] / draws, float(sums[n].square().sum()) / draws**2
        # The mean of finitely many draws has noise of its own.
        noise = (total - mean) * draws / (draws - 1)
        result[n] = math.sqrt(max(mean - noise / draws, 0.0) / noise)
    return result


def shortened(x: Any) -> Any:
    """Return nested lists and dictionaries with numbers of five digits."""
    if isinstance(x, dict):
        return {key: shortened(value) for key, value in x.items()}
    if isinstance(x, list):
        return [shortened(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def about(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "steps": args.steps,
        "wrong labels": WRONG,
        "text": "source of Python's standard library" if not args.data else Path(args.data).name,
        "command": "python benchmarks/theory_networks.py --write docs/results/theory_networks.json",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--data", default="", help="a text file for the QK-norm network")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    rows = []
    for name in NETWORKS:
        for case in CASES:
            if case.optimizer == "muon" and name == "BatchNorm":
                continue  # its spheres are rows, Muon's steps matrices
            row = compare(name, case, args.steps, 0, args.data)
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k not in ("weights", "windows")}))
    noise = {name: signals(name, args.steps, args.data) for name in NETWORKS}
    print(json.dumps({"mean gradient over noise": noise}))
    if args.write:
        found = {"about": about(args), "mean gradient over noise": noise, "rows": rows}
        text = json.dumps(shortened(found))
        args.write.write_text(text.replace('{"network"', '\n{"network"') + "\n")


if __name__ == "__main__":
    main()
