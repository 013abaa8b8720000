"""Five ways to travel on a sphere, from one point along one direction.

    python examples/plot_moves.py [--out moves.svg]

All moves end in the plane of weights and direction, that is on one great circle: what differs is
how far they go. The direction has a radial part here, as Adam's and that of momentum have.
Needs pip install "sphereopt[report]".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import sphereopt as so

LR = 0.6
W = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)  # the weights: one sphere of radius 1
U = torch.tensor([-1.6, 1.2, -0.6], dtype=torch.float64)  # the direction; a step adds -lr * U
#: Move to its colour (Okabe and Ito's) and marker.
LOOKS = {
    "retract": ("#0072b2", "o"),
    "exp": ("#d55e00", "s"),
    "renorm": ("#cc79a7", "^"),
    "hyperball": ("#009e73", "D"),
    "rotate": ("#e69f00", "v"),
}


def moved(move: str, lr: float) -> tuple[Tensor, float]:
    """Return the point that a move goes to, and the angle of its step."""
    gram = so.moves.Gram(*(x.reshape(1) for x in (W @ W, W @ U, U @ U)))
    a, b = so.moves.coefficients(move, gram, lr, W.norm().reshape(1))
    return a * W + b * U, so.moves.step_angle(gram, a, b).item()


def before_projection(move: str) -> Tensor | None:
    """Return where a move is before it is put back on the sphere, if it ever leaves it."""
    tangent = U - (W @ U) / (W @ W) * W
    if move == "retract":
        return W - LR * tangent
    if move == "renorm":
        return W - LR * U
    return W - LR * W.norm() * U / U.norm() if move == "hyperball" else None


def draw_sphere(ax) -> None:
    """Draw the sphere, the weights, and every move as an arc from them."""
    around, down = np.mgrid[0 : 2 * np.pi : 25j, 0 : np.pi : 13j]
    ball = np.sin(down) * np.cos(around), np.sin(down) * np.sin(around), np.cos(down)
    ax.plot_wireframe(*ball, color="0.85", linewidth=0.4)
    ax.plot(*np.stack([moved("exp", lr)[0] for lr in np.linspace(0, 0.75, 60)]).T, color="0.5")
    ax.scatter(*W, color="black", s=25, depthshade=False)
    ax.text(*(1.1 * W), "w")
    for move, (colour, marker) in LOOKS.items():
        end = moved(move, LR)[0]
        away = before_projection(move)
        if away is not None:
            ax.plot(*torch.stack([W, away, end]).T, color=colour, linestyle=":", linewidth=1.2)
        ax.scatter(*end, color=colour, marker=marker, s=35, depthshade=False, label=move)
    ax.set_box_aspect((1, 1, 1), zoom=1.7)
    ax.view_init(elev=18, azim=25)
    ax.set_axis_off()


def draw_angles(ax) -> None:
    """Draw the angle of every move against lr."""
    lrs = np.linspace(0, 1.2, 61)
    for move, (colour, marker) in LOOKS.items():
        angles = [moved(move, lr)[1] for lr in lrs]
        ax.plot(lrs, angles, color=colour, marker=marker, markevery=10, ms=4, label=move)
    ax.axvline(LR, color="0.85", zorder=0)
    ax.set(xlabel="lr", ylabel="angle of the step, radians", xlim=(0, 1.2), ylim=(0, 2.4))
    ax.legend(frameon=False)


def run(out: Path | None = None) -> dict[str, float]:
    """Draw, write the picture if there is a place for it; return the angle of every move at LR."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moves", "font.size": 9}):
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        draw_sphere(figure.add_subplot(1, 2, 1, projection="3d"))
        draw_angles(figure.add_subplot(1, 2, 2))
        if out is not None:
            figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    return {move: moved(move, LR)[1] for move in LOOKS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    parser.add_argument("--out", type=Path, help="the picture: .svg, .png or .pdf")
    try:
        for move, angle in run(parser.parse_args(argv).out).items():
            print(f"{move:10} {angle:.4f} rad at lr {LR}")
    except (OSError, ValueError) as error:
        parser.error(f"--out cannot be written: {' '.join(str(error).split())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
