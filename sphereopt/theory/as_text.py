"""Answers as titled tables of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sphereopt.theory.answer import Answer, Run
from sphereopt.theory.settings import Settings
from sphereopt.theory.words import Section

__all__ = ["sections"]


def sections(answer: Answer) -> list[Section]:
    """Return an answer as titled tables, in the order to read them.

    Args:
        answer: What :func:`~sphereopt.theory.answer` returned.

    Returns:
        The tables; ``str`` of each is aligned text.

    Example:
        >>> from sphereopt.theory import answer
        >>> print(sections(answer("adamw", lr=1e-3, weight_decay=0.1))[1])
        In its place
          at equilibrium    SphereAdam(lr=0.003244, betas=(0.9, 0.999))
          without momentum  lr=0.01414
    """
    result = [_equilibrium(answer)]
    if answer.plan is not None:
        result.append(_run(answer, answer.plan))
    if answer.run is not None:
        result.append(_steps(answer, answer.run))
    result.append(_sphere(answer))
    result.append(_doubled(answer))
    if answer.converted is not None:
        call = str(answer.converted)
        result.append(Section(f"Converted to {answer.converted.optimizer}", ((call,),)))
    for title, choices in (("batch size", answer.batch), ("number of steps", answer.longer)):
        if choices:
            rows = tuple((_short(choice), choice.note) for choice in choices)
            result.append(Section(f"For the other {title}, one of", rows))
    if answer.missing:
        result.append(Section("To follow the run, give", tuple((x,) for x in answer.missing)))
    if answer.warnings:
        result.append(Section("Warnings", tuple((x,) for x in answer.warnings)))
    return result


def _short(settings: Settings) -> str:
    return f"lr={settings.lr:.4g}, weight_decay={settings.weight_decay:.4g}"


def _equilibrium(answer: Answer) -> Section:
    rows = []
    for name, fact in answer.equilibrium.facts.items():
        rows.append((name, *fact))
        if name == "relaxation":
            text = "steps at constant lr until the norm is within 5 %"
            rows.append(("settling", answer.settling, text))
    known = tuple((name, f"{x:.4g}", text) for name, x, text in rows if x is not None)
    return Section(f"{answer.settings.optimizer} at equilibrium", known)


def _run(answer: Answer, plan: Mapping[str, Any]) -> Section:
    run, memories = answer.run, answer.memories
    if run is not None:
        memories = run.followed.memories
    assert memories is not None
    turned = f"cosine of first and last direction about {math.exp(-memories):.2g}"
    rows = [("length", f"{memories:.3g} memories of the direction"), ("turned", turned)]
    if run is not None:
        rise = f"rises {run.grad_rise:.3g} times to the end by the norm alone"
        rows = [("equilibrium", _reached(run)), *rows, ("gradient norm", rise)]
    options = {name: x for name, x in plan.items() if name not in ("kind", "steps")}
    shown = ", ".join(f"{name.replace('_', '-')} {_plain(x)}" for name, x in options.items())
    title = f"A run of {plan['steps']} steps, lr {plan['kind']}"
    return Section(f"{title} ({shown})" if shown else title, tuple(rows))


def _reached(run: Run) -> str:
    if run.reached is None:
        return "no: the norm does not stay near where it would settle for a relaxation time"
    first, until = run.reached
    if until == len(run.followed.lr) - 1:
        return f"yes, from step {first} to the end"
    return f"yes, from step {first} to step {until}; then lr falls faster than the norm"


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _steps(answer: Answer, run: Run) -> Section:
    followed = run.followed
    steps, last = len(followed.lr), len(followed.lr) - 1
    shown = {
        min(int((answer.plan or {}).get("warmup", 0)), last),
        *(steps * k // 100 for k in (10, 25, 50, 75)),
    }
    name, size = ("rms", followed.rms) if followed.rms is not None else ("norm", followed.norm)
    assert size is not None
    settles = followed.equilibrium
    if followed.rms is not None and followed.norm is not None:
        settles = settles * followed.rms / followed.norm
    rows = []
    for t in sorted(shown | {last}):
        values = (followed.lr[t], size[t], settles[t], followed.angle[t], run.quasi_static[t])
        ratios = (run.double_decay.angle[t], run.double_lr.angle[t])
        rows.append(
            (
                str(t),
                *(f"{x:.3g}" for x in values),
                *(_times(x, followed.angle[t]) for x in ratios),
            )
        )
    header = ("step", "lr", name, "settles at", "angle", "if settled", "2 x decay", "2 x lr")
    return Section("Step by step (angle: what lr a sphere optimizer needs)", tuple(rows), header)


def _times(value: float, other: float) -> str:
    return f"x {value / other:.2f}" if other > 0 else "-"


def _sphere(answer: Answer) -> Section:
    rows = [("at equilibrium", str(answer.sphere))]
    if answer.run is not None:
        angle = answer.run.followed.angle
        peak = int(angle.argmax())
        rows.append(
            ("in this run", f"lr={angle[peak]:.4g} at its peak, step {peak}, to {angle[-1]:.4g}")
        )
    rows.append(("without momentum", f"lr={answer.equilibrium.diffusive_angle:.4g}"))
    return Section("In its place", tuple(rows))


def _doubled(answer: Answer) -> Section:
    header = ("", "angle", "norm", "memory")
    rows = tuple(
        (name, *(f"x {x:.3f}" for x in (twice.angle, twice.size, twice.memory)))
        for name, twice in (
            ("twice the weight decay", answer.double_decay),
            ("twice the lr", answer.double_lr),
        )
    )
    return Section("What doubling does at equilibrium", rows, header)
