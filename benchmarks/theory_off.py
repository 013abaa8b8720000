"""What often-quoted formulas would have said, beside what random walks of torch's optimizers do.

Used by ``theory_simulation.py``. Every claim is a row: the quoted value, the right one and the
measured one, at the settings of ``tests/random_walk.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from random_walk import CASE, Case, RandomWalk, smooth
from torch import nn

from sphereopt.theory import equilibrium, schedule, trajectory
from sphereopt.theory.shapes import newton_schulz

OFF_MARKS = "<!-- table -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Claim:
    """A quoted formula; values are compared as ratios, chords (distances) with nothing."""

    quoted: str
    said: str
    right: str
    quoted_value: float
    right_value: float
    measured: float | None = None

    @property
    def off(self) -> tuple[str, str]:
        """Return how far off the quoted and the right formula are, as text."""
        values = self.quoted_value, self.right_value
        if self.measured is None:
            first, second = (f"chord {x:.1g}" for x in values)
            return first, second
        first, second = (x / self.measured - 1 for x in values)
        shown = f"{1 + first:.3g} times" if abs(first) > 1 else f"{first:+.1%}"
        return shown.replace("%", " %"), f"{second:+.1%}".replace("%", " %")


@dataclass(frozen=True)
class _Found:
    norm: float
    angle: float
    kappa: float


def slow(label: str) -> Case:
    """Return a case at a tenth of its decay, where leading order in lr * weight_decay is enough."""
    case = CASE[label]
    return case if case.optimizer == "muon" else replace(case, weight_decay=case.weight_decay / 10)


@cache
def found(case_label: str, forgets: bool = False) -> _Found:
    """Return what a slow case does at equilibrium; how fast it forgets only if asked for."""
    case = slow(case_label)
    expected = equilibrium(case.optimizer, lr=case.lr, weight_decay=case.weight_decay, **case.sized)
    blocks = 16 if case.optimizer == "muon" else 512 if forgets else 128
    walk = RandomWalk(case, [expected.norm], blocks=blocks, seed=2)
    walk.run([case.lr] * int(5 * expected.relaxation))
    after = walk.run([case.lr] * int(max(300, 5 * expected.relaxation)))
    norm, angle = (math.sqrt(np.mean(x**2)) for x in (after.norm, after.angle))
    kappa = walk.forgetting(int(0.5 * expected.memory), 6) if forgets else math.nan
    return _Found(norm, angle, kappa)


def measured_claims() -> list[dict[str, Any]]:
    """Measure everything; return rows."""
    return [asdict(claim) for parts in (_sgd, _adaptive, _runs, _removal) for claim in parts()]


def off_table(rows: list[dict[str, Any]]) -> str:
    """Return the claims as a Markdown table."""
    head = (
        "| quoted | where | under torch | quoted, off by | right, off by |\n|---|---|---|---|---|\n"
    )
    claims = [Claim(**row) for row in rows]
    return head + "\n".join(
        f"| {c.quoted} | {c.said} | {c.right} | {c.off[0]} | {c.off[1]} |" for c in claims
    )


def _momentum() -> Iterator[Claim]:
    case, seen = slow("sgd, momentum 0.9"), found("sgd, momentum 0.9", forgets=True)
    lr, wd, mu = case.lr, case.weight_decay, 0.9
    turn = math.sqrt(2 * seen.kappa)
    yield Claim(
        r"effective lr with momentum: $lr/\lvert w\rvert^2$",
        "carried over from SGD without (van Laarhoven, 2017)",
        r"$lr/((1-\mu)\lvert w\rvert^2)$",
        lr / seen.norm**2,
        lr / (1 - mu) / seen.norm**2,
        turn,
    )
    yield Claim(
        r"intrinsic lr with momentum: $lr\,\lambda$",
        "carried over from SGD without (Li, Lyu and Arora, 2020)",
        r"$\kappa = lr\,\lambda/(1-\mu)$",
        lr * wd,
        lr * wd / (1 - mu),
        seen.kappa,
    )
    yield Claim(
        r"norm with momentum: $\lvert w\rvert^4=lr\,\hat g^2/2\lambda$",
        "carried over from SGD without",
        r"$lr\,\hat g^2/(2\lambda(1-\mu))$",
        (lr / (2 * wd)) ** 0.25,
        (lr / (2 * wd * (1 - mu))) ** 0.25,
        seen.norm,
    )


def _momentum_angles() -> Iterator[Claim]:
    case, seen = slow("sgd, momentum 0.9"), found("sgd, momentum 0.9", forgets=True)
    lr, wd, mu = case.lr, case.weight_decay, 0.9
    turn = math.sqrt(2 * seen.kappa)
    yield Claim(
        r"angle with momentum: $\sqrt{2\,lr\,\lambda}$",
        "carried over from SGD without",
        r"$\sqrt{2\,lr\,\lambda/(1+\mu)}$ per step",
        math.sqrt(2 * lr * wd),
        math.sqrt(2 * lr * wd / (1 + mu)),
        seen.angle,
    )
    yield Claim(
        r"the same, of many steps: $\sqrt{2\,lr\,\lambda}$",
        "the same",
        r"$\theta_{diff}=\sqrt{2\,lr\,\lambda/(1-\mu)}$",
        math.sqrt(2 * lr * wd),
        math.sqrt(2 * lr * wd / (1 - mu)),
        turn,
    )
    yield Claim(
        r"$\lvert g\rvert/\lvert w\rvert=\sqrt{2\lambda/lr}$ with momentum",
        "Defazio, 2025 (for SGD, where it is right)",
        r"$\sqrt{2\lambda(1-\mu)/lr}$",
        math.sqrt(2 * wd / lr),
        math.sqrt(2 * wd * (1 - mu) / lr),
        1 / seen.norm**2,
    )


def _sgd() -> Iterator[Claim]:
    yield from _momentum()
    yield from _momentum_angles()
    for label in ("nesterov 0.9", "nesterov 0.5"):
        case, mu = slow(label), CASE[label].hyper["momentum"]
        plain = math.sqrt(2 * case.lr * case.weight_decay / (1 + mu))
        yield Claim(
            rf"$\sqrt{{2\,lr\,\lambda/(1+\mu)}}$ with Nesterov, $\mu={mu}$",
            "Wan et al., 2021 (for heavy ball)",
            r"times $\sqrt{1+2\mu-2\mu^3}$",
            plain,
            plain * math.sqrt(1 + 2 * mu - 2 * mu**3),
            found(label).angle,
        )
    case, seen, mu = slow("sgdw"), found("sgdw"), 0.9
    yield Claim(
        r"$\lvert g\rvert/\lvert w\rvert=\sqrt{2\lambda/lr}$, decay decoupled",
        "Defazio, 2025 (for SGD)",
        r"$(1-\mu)\sqrt{2\lambda/lr}$",
        math.sqrt(2 * case.weight_decay / case.lr),
        (1 - mu) * math.sqrt(2 * case.weight_decay / case.lr),
        1 / seen.norm**2,
    )


def _adaptive() -> Iterator[Claim]:
    case, seen, b1 = slow("adamw (0.9, 0.999)"), found("adamw (0.9, 0.999)"), 0.9
    rms, spread = seen.norm / math.sqrt(case.dim), case.lr / case.weight_decay
    product, short = case.lr * case.weight_decay, (1 - b1) / (1 + b1)
    right = r"$\sqrt{lr/2\lambda}$", math.sqrt(spread / 2), rms
    yield Claim(
        r"AdamW: rms $\sqrt{\tfrac{lr}{2\lambda}\tfrac{1-\beta_1}{1+\beta_1}}$",
        "taking updates to be orthogonal to weights",
        right[0],
        math.sqrt(spread / 2 * short),
        *right[1:],
    )
    yield Claim(
        r"AdamW: rms $\sqrt{lr/\lambda}$", "rules of thumb", right[0], spread**0.5, *right[1:]
    )
    yield Claim(
        r"AdamW: angle $\sqrt{2\,lr\,\lambda}$",
        "right for many steps, quoted for one",
        r"times $\sqrt{(1-\beta_1)/(1+\beta_1)}$",
        math.sqrt(2 * product),
        math.sqrt(2 * product * short),
        seen.angle,
    )
    yield from _alignments()


def _alignments() -> Iterator[Claim]:
    bare = found("adamw (0, 0.95)", forgets=True)
    seen = found("adamw (0.9, 0.95)", forgets=True)
    yield Claim(
        "the angle per step says how fast a run moves",
        r"comparing $\beta_1=0$ with 0.9 at one $lr\,\lambda$",
        r"compare $\theta_{diff}=\sqrt{K}\,\theta$",
        bare.angle / seen.angle,
        1.0,
        math.sqrt(bare.kappa / seen.kappa),
    )
    case, seen = slow("signum"), found("signum")
    b, unit = 0.9, math.sqrt(case.lr / (2 * case.weight_decay) * case.dim)
    lags = 2 / math.pi * np.arcsin(b ** np.arange(1.0, 400))
    yield Claim(
        r"signum: rms$^2=\tfrac{lr}{2\lambda}\tfrac{1+\beta}{1-\beta}$",
        "taking signs to correlate as their buffers do",
        r"$\tfrac{lr}{2\lambda}K$, $K=1+\tfrac4\pi\sum_k\arcsin\beta^k$",
        unit * math.sqrt((1 + b) / (1 - b)),
        unit * math.sqrt(1 + 2 * lags.sum()),
        seen.norm,
    )
    yield from _shaped()


def _shaped() -> Iterator[Claim]:
    for label in ("sign", "lion"):
        case, size, aligned = slow(label), 1.0, 1.0
        if label == "lion":
            b1, b2 = case.hyper["betas"]
            size = (1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)
            first = b1 * (1 - b1) * (1 - b2) + b1**2 * b2 * (1 - b2) / (1 + b2)
            lags = first / size * b2 ** np.arange(0.0, 4000)
            aligned = 1 + 4 / math.pi * np.arcsin(lags).sum()
        product = case.lr * case.weight_decay
        yield Claim(
            rf"{label}: angle $\sqrt{{\pi\,lr\,\lambda\,S}}$, the sign taken as linear",
            "Kosson et al., 2024 (for Lion)",
            r"$\sqrt{2\,lr\,\lambda/K}$, $K$ by the arcsine law",
            math.sqrt(math.pi * product * size),
            math.sqrt(2 * product / aligned),
            found(label).angle,
        )
    for label in ("muon, square", "muon, wide"):
        case, seen, mu = CASE[label], found(label), 0.95
        ours = equilibrium("muon", lr=case.lr, weight_decay=case.weight_decay, **case.sized)
        yield Claim(
            rf"{label}, Nesterov: $K=(1+\mu)/(1-\mu)$",
            "taking updates to correlate as in a linear filter",
            f"$K={ours.K:.0f}$ from the filter and the shape",
            math.sqrt(2 * case.lr * case.weight_decay * (1 - mu) / (1 + mu)),
            ours.angle,
            seen.angle,
        )
        shape = case.hyper["shape"]
        # Where the norm stands still: (lr U / |w|)^2 = 1 + a^2 - 2a cos(angle).
        a = 1 - case.lr * case.weight_decay
        yield Claim(
            rf"{label}: updates of norm $\sqrt{{\min(m,n)}}$",
            "taking Newton-Schulz to orthogonalize",
            "what the quintic makes of a random matrix",
            math.sqrt(min(shape)),
            math.sqrt(newton_schulz(*shape).power),
            seen.norm * math.sqrt(1 + a * a - 2 * a * math.cos(seen.angle)) / case.lr,
        )


def _runs() -> Iterator[Claim]:
    case = CASE["adamw (0.9, 0.95)"]
    steps = 1200
    settled = equilibrium("adamw", lr=case.lr, weight_decay=1.0, **case.sized)
    rates = schedule("cosine", case.lr, steps)
    seen = RandomWalk(case, [settled.norm], blocks=512, seed=2).run(rates)
    angle = smooth(seen.angle[:, 0])
    run = trajectory("adamw", lr=rates, weight_decay=1.0, norm0=settled.norm, **case.sized)
    for share in (0.75, 0.9):
        at = int(share * steps)
        yield Claim(
            r"a cosine of the rate is a root of it for the angle, "
            rf"$\theta_t=\sqrt{{2\,lr_t\lambda/K}}$, at {share:.0%} of 3 memories".replace(
                "%", " %"
            ),
            "equilibrium taken at every step",
            "the recursion of `trajectory`",
            math.sqrt(2 * rates[at] * 0.1 / 1.9),
            smooth(run.angle)[at - 10],
            angle[at - 10],
        )
    slower = replace(case, lr=1e-3, weight_decay=0.3, hyper={"betas": (0.9, 0.999)})
    yield from (_settling(slower, start) for start in (0.3, 3.0))
    yield _growth()


def _settling(case: Case, start: float) -> Claim:
    product = case.lr * case.weight_decay
    norm = equilibrium("adamw", lr=case.lr, weight_decay=case.weight_decay, **case.sized).norm
    rates = [case.lr] * int(5 / product / 2)
    run = trajectory(
        "adamw", lr=rates, weight_decay=case.weight_decay, norm0=start * norm, **case.sized
    )
    seen = RandomWalk(case, [start * norm], blocks=256, seed=2).run(rates).norm[:, 0]
    last, right = (int(np.flatnonzero(np.abs(x / norm - 1) > 0.05)[-1]) for x in (seen, run.norm))
    edge = 0.95 if start < 1 else 1.05
    return Claim(
        rf"AdamW, $\beta_2=0.999$: rms$^2$ settles as $e^{{-2\,lr\,\lambda t}}$, from {start}",
        "without the lag of the second moment",
        "the recursion of `trajectory`",
        math.log((start**2 - 1) / (edge**2 - 1)) / (2 * product),
        right,
        last,
    )


def _growth() -> Claim:
    mu, steps = 0.9, 1000
    grown = []
    for options, lr in ((CASE["sgd, momentum 0.9"].hyper, 0.1), ({}, 0.1 / (1 - mu))):
        case = Case("free", "sgd", lr, 0.0, options)
        norm = RandomWalk(case, [3.0], blocks=256, seed=2).run([lr] * steps).norm[-1, 0]
        grown.append(norm**4 - 3.0**4)
    return Claim(
        r"momentum makes norms grow $(1+\mu)/(1-\mu)$ times faster, no decay",
        r"Heo et al., 2021 (at equal norm of updates), read at equal $lr/(1-\mu)$",
        "as fast",
        (1 + mu) / (1 - mu),
        1.0,
        grown[0] / grown[1],
    )


def _removal() -> Iterator[Claim]:
    lr, wd, mu, steps = 0.1, 2e-2, 0.9, 300
    # The larger root of x^2 - (1 + mu - lr*wd) x + mu.
    middle = (1 + mu - lr * wd) / 2
    alpha = middle + math.sqrt(middle**2 - mu)
    shrunk, buffer = [1.0], 0.0
    for _ in range(steps):
        buffer = mu * buffer + wd * shrunk[-1]
        shrunk.append(shrunk[-1] - lr * buffer)
    exact = [lr / (shrunk[t] * shrunk[t + 1]) for t in range(steps)]
    options = {"momentum": mu}
    goal = _directions("SGD", [lr] * steps, wd, options)

    def chord(rates: list[float]) -> float:
        return float((_directions("SGD", rates, 0.0, options) - goal).norm())

    yield Claim(
        r"decay removed by $lr\,\alpha^{-2t-1}$ from an empty buffer",
        "Li and Arora, 2020 (who start from another buffer)",
        "`theory.without_weight_decay`",
        chord([lr * alpha ** (-2 * t - 1) for t in range(steps)]),
        chord(exact),
    )
    yield Claim(
        r"the same with $\alpha=1-lr\,\lambda$",
        "carried over from SGD without momentum",
        r"$\alpha^2-(1+\mu-lr\,\lambda)\alpha+\mu=0$, and that buffer",
        chord([lr * (1 - lr * wd) ** (-2 * t - 1) for t in range(steps)]),
        chord(exact),
    )


def _directions(name: str, rates: list[float], weight_decay: float, options: Any) -> torch.Tensor:
    """Return the direction after training a small scale-invariant function of 64 weights."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(64, generator=generator, dtype=torch.float64))
    kinds = {"lr": 1.0, "weight_decay": weight_decay, **options}
    optimizer = getattr(torch.optim, name)([w], **kinds)
    for lr in rates:
        optimizer.param_groups[0]["lr"] = lr
        x = torch.randn(8, 64, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        torch.tanh(x @ w / w.norm() - x[:, 0]).square().mean().backward()
        optimizer.step()
    return w.detach() / w.detach().norm()
