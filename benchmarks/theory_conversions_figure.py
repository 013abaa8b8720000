"""Draw ``theory_conversions.json`` and ``theory_networks.json``, and write the pages' tables.

python benchmarks/theory_conversions_figure.py [--docs docs]
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from sphereopt.theory import alignment, translate

# Colour-blind safe (Okabe and Ito, 2008).
BLUE, SKY, GREEN, ORANGE, RED, PINK = (
    "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7",
)  # fmt: skip
COLOURS = (BLUE, GREEN, ORANGE, RED, PINK, SKY)
NETWORKS = {"BatchNorm": "o", "LayerNorm": "s", "QK-norm": "^"}
MARKS = "<!-- table -->", "<!-- end of table -->"


def removal(runs: dict[str, list[float]], path: Path) -> None:
    """Draw the distance of directions to those of the run with decay."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    styles = {"SGD": "-", "Nesterov": ":", "AdamW": "--"}
    for (label, run), colour in zip(
        runs.items(), (BLUE, ORANGE, RED, PINK, BLUE, GREEN, SKY), strict=True
    ):
        steps = 5 * (np.arange(len(run)) + 1)
        axes.semilogy(steps, run, styles[label.split(":")[0]], color=colour, label=label)
    axes.set(xlabel="step", ylabel="distance of directions", ylim=(1e-16, 3))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, axes, path)


def curves(part: dict[str, Any], path: Path, xlabel: str, above: float) -> None:
    """Draw the loss of every arm less that of the first, and the losses themselves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")
    names = list(part)
    base = np.array(part[names[0]]["loss"])
    x = (np.arange(len(base)) + 1) / len(base)
    for name, colour in zip(names[1:], COLOURS, strict=False):
        loss = np.array(part[name]["loss"])
        style = ":" if "other" in name else "-"
        left.plot(x, loss, style, color=colour)
        right.plot(x, loss - base, style, color=colour, label=name)
    left.plot(x, base, color="black", label=names[0])
    right.plot([], [], color="black", label=names[0])
    right.axhline(0, color="black", linewidth=1)
    left.set(xlabel=xlabel, ylabel="loss", ylim=(None, above))
    # The start would hide the rest.
    late = [line.get_ydata()[len(base) // 5 :] for line in right.get_lines()[: len(names) - 1]]
    bound = 1.3 * np.abs(np.concatenate(late)).max()
    right.set(xlabel=xlabel, ylabel="difference of losses", ylim=(-bound, bound))
    figure.legend(*right.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3,
                  loc="outside lower center")  # fmt: skip
    save(figure, left, path, right)


def networks(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw predicted over measured norm and angle of every weight at equilibrium."""
    labels = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure, panels = plt.subplots(
        1, 2, figsize=(7.2, 3.4), sharex=True, sharey=True, layout="constrained"
    )
    shift = dict(zip(NETWORKS, (-0.22, 0, 0.22), strict=True))
    for axes, key, band in zip(panels, ("angle", "norm"), (0.05, 0.1), strict=True):
        axes.axvspan(1 - band, 1 + band, color="0.92", zorder=0)
        axes.axvline(1, color="0.6", linewidth=1, zorder=0)
        for (network, marker), colour in zip(NETWORKS.items(), (BLUE, ORANGE, GREEN), strict=True):
            points = [
                (w[f"{key} predicted"] / w[key], labels.index(row["optimizer"]) + shift[network])
                for row in rows
                if row["network"] == network
                for w in row["weights"]
            ]
            axes.plot(*zip(*points, strict=True), marker, color=colour, label=network,
                      markerfacecolor="none", markersize=5)  # fmt: skip
        axes.set(xlabel=f"{key}, predicted over measured")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3,
                  loc="outside lower center")  # fmt: skip
    figure.savefig(path, metadata={"Date": None})


def save(figure: Any, axes: Any, path: Path, *more: Any) -> None:
    for each in (axes, *more):
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def joined(*rows: tuple[str, ...]) -> str:
    """Return a Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def errors_table(rows: list[dict[str, Any]]) -> str:
    """Return errors: mean over weights (and windows of steps), worst in brackets."""
    head = ("network", "optimizer", "angle", "norm", "angle, schedule", "norm, schedule")
    lines = []
    for row in rows:
        cells = [row["network"], row["optimizer"]]
        for what in ("equilibrium", "schedule"):
            for key in ("angle", "norm"):
                error = row[f"{what}, {key} error"]
                cells.append(f"{error['mean']:.1%} ({error['worst']:.1%})".replace("%", " %"))
        lines.append(tuple(cells))
    return joined(head, *lines)


def removal_table(found: dict[str, dict[str, list[float]]]) -> str:
    head = ("learning rates", "BatchNorm rows", "LayerNorm matrices")
    rows = [(name, *(f"{max(found[kind][name]):.1e}" for kind in found)) for name in found["bn"]]
    return joined(head, *rows)


def curves_table(part: dict[str, Any]) -> str:
    rows = [
        (name, *(f"{row[key]:.4f}" for key in ("final", "distance", "distance later")))
        for name, row in part.items()
    ]
    return joined(("", "final loss", "distance of the curve", "after a fifth of it"), *rows)


def factors_table() -> str:
    """Return what AdamW's settings are multiplied by for other optimizers, at little decay."""
    cases = (
        ("Lion (0.9, 0.99)", "lion", {}),
        ("Lion (0.95, 0.98)", "lion", {"betas": (0.95, 0.98)}),
        ("sign", "sign", {}),
        ("signum 0.9", "signum", {}),
        *(
            (f"Muon, {rows} x {columns}, match_rms_adamw", "muon",
             {"shape": (rows, columns), "adjust_lr_fn": "match_rms_adamw"})
            for rows, columns in ((256, 256), (1024, 1024), (256, 1024), (4096, 1024))
        ),
        ("Muon, 1024 x 1024, original", "muon", {"shape": (1024, 1024)}),
    )  # fmt: skip
    rows = []
    for label, name, hyper in cases:
        made = translate("adamw", name, lr=1e-4, weight_decay=1e-2, target_hyper=hyper)
        k = alignment(name, **made.hyper)
        factors = made.lr / 1e-4, made.weight_decay / 1e-2
        rows.append((label, *(f"{x:.3g}" for x in (*factors, k))))
    return joined(("to", "$lr$ times", "$\\lambda$ times", "$K$"), *rows)


def tables(results: Path) -> dict[str, str]:
    """Return the table of every page."""
    found = json.loads((results / "theory_conversions.json").read_text())
    rows = json.loads((results / "theory_networks.json").read_text())["rows"]
    return {
        "networks.md": errors_table(rows),
        "weight_decay_removal.md": removal_table(found["removal"]),
        "conversions.md": curves_table(found["angles"]),
        "batch_and_duration.md": curves_table(found["batch"]),
        "between_optimizers.md": factors_table(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    results = args.docs / "results"
    mpl.rcParams.update({"svg.hashsalt": "sphereopt", "svg.fonttype": "none"})
    found = json.loads((results / "theory_conversions.json").read_text())
    removal(found["removal"]["ln"], results / "theory-removal.svg")
    curves(found["angles"], results / "theory-angle_schedule.svg", "share of the run", 1.5)
    curves(found["batch"], results / "theory-batch.svg", "share of all samples", 1.5)
    rows = json.loads((results / "theory_networks.json").read_text())["rows"]
    networks(rows, results / "theory-networks.svg")
    before, after = MARKS
    for name, table in tables(results).items():
        page = args.docs / "theory" / name
        text = f"{before}\n\n{table}\n\n{after}".replace("\\", "\\\\")
        page.write_text(re.sub(f"{before}.*{after}", text, page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
