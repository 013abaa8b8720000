"""Pictures of theory (lines) over random walks (points), one for each page of ``docs/theory``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from random_walk import CASE, TRAVELLED, Case

from sphereopt.theory import equilibrium, schedule, trajectory

#: Colour-blind safe (Okabe and Ito, 2008), one for each start.
COLOURS = {0.3: "#0072b2", 3.0: "#d55e00"}
GREY = "#777777"
MOVING = {case.label: case for case in TRAVELLED}
#: Which runs each page shows.
PAGES = {
    "sgd": ["sgd"],
    "momentum": ["sgd, momentum 0.9", "sgd, dampening 0.5"],
    "nesterov": ["nesterov 0.9"],
    "sgdw": ["sgdw"],
    "adamw": ["adamw (0.9, 0.95)", "adamw (0.9, 0.999)"],
    "adam_l2": ["adam (L2)"],
    "sign": ["sign", "signum"],
    "lion": ["lion"],
    "muon": ["muon, square", "muon, wide"],
}


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write ``theory-*.svg`` into a folder."""
    mpl.use("svg")
    # Text stays text, and the same picture is the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "theory", "font.size": 9})
    runs = {(row["case"], row["start"]): row for row in results["trajectories"]}
    for page, labels in PAGES.items():
        figure, axes = plt.subplots(
            len(labels),
            2,
            figsize=(7, 0.3 + 2.4 * len(labels)),
            layout="constrained",
            squeeze=False,
        )
        for row, label in zip(axes, labels, strict=True):
            _run(row, MOVING[label], runs)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
        _save(figure, folder / f"theory-{page}.svg")
    _save(_errors(results), folder / "theory-random_walk.svg")
    _save(_schedules(results), folder / "theory-schedules.svg")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _run(axes: Any, case: Case, runs: dict[tuple[str, float], dict[str, Any]]) -> None:
    """Draw norm and angle of one optimizer from both starts."""
    settled = equilibrium(case.optimizer, lr=case.lr, weight_decay=case.weight_decay, **case.sized)
    rates = schedule("cosine", case.lr, case.steps, warmup=case.steps // 10, final=0.05)
    for start, colour in COLOURS.items():
        theory = trajectory(
            case.optimizer,
            lr=rates,
            weight_decay=case.weight_decay,
            norm0=start * settled.norm,
            **case.sized,
        )
        seen = runs[case.label, start]
        for panel, line, points in (
            (axes[0], theory.norm / settled.norm, np.array(seen["norms"]) / settled.norm),
            (axes[1], theory.angle, seen["angles"]),
        ):
            at = np.unique(np.geomspace(1, case.steps, 120).astype(int)) - 1
            panel.semilogy(at, line[at], color=colour, linewidth=1.2, label=f"from {start:g}")
            panel.plot(seen["steps"], points, "o", color=colour, markersize=3, fillstyle="none")
    axes[0].axhline(1, color=GREY, linewidth=0.8, linestyle="--", label="equilibrium")
    axes[1].axhline(settled.angle, color=GREY, linewidth=0.8, linestyle="--")
    axes[0].set_yticks([0.3, 1, 3], ["0.3", "1", "3"])
    axes[0].minorticks_off()
    axes[0].set(title=case.label, ylabel="norm / equilibrium norm", xlabel="step")
    axes[1].set(title="line: theory, points: simulation", ylabel="angle, rad", xlabel="step")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)


def _errors(results: dict[str, Any]) -> Any:
    """Draw the errors of all optimizers at equilibrium."""
    rows = results["equilibrium"]
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    place = np.arange(len(rows))[::-1]
    for name, colour, marker in (("norm", "#0072b2", "o"), ("angle", "#d55e00", "x")):
        errors = [100 * row[f"{name} error"] for row in rows]
        axes.plot(errors, place, marker, color=colour, label=name, fillstyle="none", markersize=5)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.axvspan(-1, 1, color="0.94", zorder=0)
    axes.set_yticks(place, [row["case"] for row in rows])
    axes.set(xlabel="predicted over simulated, less 1, in %", xlim=(-2, 2))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _schedules(results: dict[str, Any]) -> Any:
    """Draw the recursion and the quasi-static angle, for runs of 3 and 30 memories."""
    case = CASE["adamw (0.9, 0.95)"]
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained", sharey=True)
    for panel, run in zip(axes, results["schedules"], strict=True):
        steps = run["count"]
        rates = schedule("cosine", case.lr, steps, warmup=steps // 20)
        share = np.arange(steps) / steps
        theory = trajectory("adamw", lr=rates, weight_decay=1.0, norm0=run["norm0"], **case.sized)
        kept = rates > 0
        static = [
            equilibrium("adamw", lr=lr, weight_decay=1.0, **case.hyper).angle
            for lr in rates[kept][:: max(1, steps // 200)]
        ]
        at = np.linspace(0, steps - 1, 200).astype(int)
        panel.semilogy(share[at], theory.angle[at], color="#0072b2", label="recursion")
        panel.plot(
            share[kept][:: max(1, steps // 200)], static, "--", color=GREY, label="quasi-static"
        )
        panel.plot(
            np.array(run["steps"]) / steps,
            run["angles"],
            "o",
            color="#d55e00",
            markersize=3,
            fillstyle="none",
            label="simulation",
        )
        panel.set(xlabel="share of the run", title=f"{run['memories']:.0f} memories")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="angle, rad", ylim=(1e-4, math.sqrt(2 * 5e-3)))
    axes[0].legend(frameon=False)
    return figure
