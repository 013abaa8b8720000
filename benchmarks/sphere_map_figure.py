"""Draw docs/results/sphere_map.svg: where standardization sends three numbers.

python benchmarks/sphere_map_figure.py
"""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch

from sphereopt.nn.functional import standardize

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
OUT = Path(__file__).parent.parent / "docs" / "results" / "sphere_map.svg"


def half_planes(count: int, points: int) -> list[np.ndarray]:
    """Return points of ``count`` half planes that the diagonal bounds."""
    generator = np.random.default_rng(3)
    across = np.array([[1, -1, 0], [1, 1, -2]]) / np.array([[math.sqrt(2)], [math.sqrt(6)]])
    sets = []
    for turn in range(count):
        angle = 2 * math.pi * (turn + 0.3) / count
        outward = across.T @ np.array([math.cos(angle), math.sin(angle)])
        distance, height = generator.uniform(0.4, 3.2, points), generator.uniform(-2, 2, points)
        sets.append(distance[:, None] * outward + height[:, None] / math.sqrt(3))
    return sets


def main():
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "sphere_map"})
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(5.2, 4.6))
    axes = figure.add_subplot(projection="3d", computed_zorder=False)
    turns = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
    circle = torch.stack([torch.cos(turns + 2 * math.pi * k / 3) for k in range(3)], 1)
    axes.plot(*(math.sqrt(2) * circle.numpy().T), color="#444444", lw=1.5)
    axes.plot(*np.outer([1, 1, 1], [-2.2, 2.2]), color="#444444", lw=1, ls="--")
    axes.text(2.3, 2.3, 2.4, "e = (1, 1, 1)", color="#444444")
    for colour, points in zip(COLOURS, half_planes(6, 7), strict=True):
        images = standardize(torch.from_numpy(points)).numpy()
        for point, image in zip(points, images, strict=True):
            axes.plot(*zip(point, image, strict=True), color=colour, lw=0.6, alpha=0.6)
        axes.scatter(*points.T, color=colour, s=9, alpha=0.8)
        axes.scatter(*images[:1].T, color=colour, s=70, edgecolor="black", zorder=5)
    for name, around in zip(("x_1", "x_2", "x_3"), np.eye(3), strict=True):
        axes.plot(*np.outer(around, [0, 2.6]), color="#999999", lw=0.8)
        axes.text(*(2.8 * around), f"${name}$", color="#666666")
    axes.set(xlim=(-2, 2), ylim=(-2, 2), zlim=(-2, 2), box_aspect=(1, 1, 1))
    axes.set_axis_off()
    axes.view_init(elev=16, azim=18)
    figure.savefig(OUT, metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    main()
