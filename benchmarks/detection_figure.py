"""Draw ``docs/results/detection.json``: what is invariant where, and who errs about it.

python benchmarks/detection_figure.py [--out docs/results]
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

# Colour-blind safe (Okabe and Ito, 2008).
BLUE, SKY, GREY, ORANGE, RED = "#0072b2", "#56b4e9", "#dddddd", "#e69f00", "#d55e00"


def draw(rows, path):
    """Write the figure.

    Args:
        rows: Rows of the JSON file.
        path: Of the SVG file.
    """
    rows = [row for row in rows if not row["model"].startswith("small")]
    rows = sorted(rows, key=lambda r: (r["invariant"] / r["matrices"], r["matrices"]))
    names, y = [r["model"] for r in rows], range(len(rows))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 0.17 * len(rows) + 1.2), sharey=True, layout="constrained"
    )
    start = [0.0] * len(rows)
    for label, colour, part in (
        ("by themselves", BLUE, lambda r: r["invariant"] - r["with_bias"]),
        ("only with their bias", SKY, lambda r: r["with_bias"]),
        ("not, or only with other matrices", GREY, lambda r: r["matrices"] - r["invariant"]),
    ):
        widths = [part(r) / r["matrices"] for r in rows]
        left.barh(y, widths, left=start, color=colour, label=label)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    left.set_xlabel("share of the matrices that is scale-invariant")
    left.set_yticks(y, names, fontsize=6)
    left.legend(loc="lower right", fontsize=7, framealpha=1)
    marks = (("AdamP, false", RED, "false"), ("AdamP, missed", ORANGE, "missed"))
    start = [0.0] * len(rows)
    for label, colour, key in marks:
        widths = [r["adamp"][key] / r["matrices"] for r in rows]
        right.barh(y, widths, left=start, color=colour, label=label)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    wrong = [r["ours"]["false"] + r["ours"]["missed"] for r in rows]
    ours = [n / r["matrices"] for n, r in zip(wrong, rows, strict=True)]
    right.plot(
        ours,
        y,
        "|",
        color=BLUE,
        markersize=6,
        clip_on=False,
        zorder=3,
        label=f"find_spheres, false or missed ({sum(wrong)} in all)",
    )
    right.set_xlabel("share of the matrices judged wrongly")
    right.legend(loc="center right", fontsize=7, framealpha=1)
    left.set_ylim(-0.7, len(rows) - 0.3)
    for axes in (left, right):
        axes.set_xlim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    out = parser.parse_args().out
    mpl.rcParams["svg.hashsalt"] = "sphereopt"
    rows = json.loads((out / "detection.json").read_text())["rows"]
    draw(rows, out / "detection.svg")
    print(f"wrote {out / 'detection.svg'}")


if __name__ == "__main__":
    main()
