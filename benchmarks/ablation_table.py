"""Write the tables and the picture of ``ablation.py``'s results.

    python benchmarks/ablation_table.py [--json docs/results/ablation.json]
        [--page docs/ablation.md] [--svg docs/results/ablation.svg] [--print]

The tables go between the marks ``<!-- tables -->`` and ``<!-- end of tables -->`` of the page.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
from ablation import CENTRE, CENTRE_MOVE, CHOOSE, REPORT, arms, best_lr, finite
from matplotlib import pyplot as plt
from scipy.stats import t as student

# Colour-blind safe (Okabe and Ito, 2008).
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#888888"
TITLES = {
    "conv-sgd": "BatchNorm network, SGD family",
    "digits-sgd": "BatchNorm network on digits, SGD family",
    "conv-adam": "BatchNorm network, Adam family",
    "gpt-adam": "Normalized transformer, Adam family",
    "plain-adam": "Plain transformer, on spheres by choice, Adam family",
}
#: Differences that the picture shows, in nats.
FRAME = 0.03
MARKS = "<!-- tables -->", "<!-- end of tables -->"


def half_width(values):
    """Return half the width of the 95 % interval of a mean (Student)."""
    count = len(values)
    return student.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)


def difference(final, other):
    """Return mean, half-width and number of the differences of two arms, paired by seed."""
    seeds = sorted(final.keys() & other.keys())
    pairs = [final[seed]["held-out loss"] - other[seed]["held-out loss"] for seed in seeds]
    return statistics.fmean(pairs), half_width(pairs), len(pairs)


def summary(rows):
    """Return the figures of an arm: its losses by lr, and its fresh runs at the best one."""
    lr, by_lr = best_lr(rows), defaultdict(list)
    for row in rows:
        if row["seed"] in CHOOSE:
            by_lr[row["lr"]].append(finite(row))
    final = {r["seed"]: r for r in rows if r["lr"] == lr and r["seed"] not in CHOOSE}
    columns = ("held-out loss", "training loss", "accuracy", "angle, half-way")
    return {
        "lr": lr,
        "losses": {x: statistics.fmean(losses) for x, losses in by_lr.items()},
        "final": final,
        "mean": {key: statistics.fmean(final[s][key] for s in REPORT) for key in columns},
    }


def complete(rows):
    """Return whether an arm has been run on all seeds at its best lr."""
    lr = best_lr(rows)
    return {r["seed"] for r in rows if r["lr"] == lr} >= {*CHOOSE, *REPORT}


def summaries(results, task):
    """Return arm -> figures, for the arms of a task that are complete."""
    rows = defaultdict(list)
    for row in results["runs"]:
        if row["task"] == task:
            rows[row["arm"]].append(row)
    names = [arm.name for arm in arms(task.split("-")[1])]
    return {name: summary(rows[name]) for name in names if rows[name] and complete(rows[name])}


def signed(x):
    """Return a number with its sign, to four decimals, with a real minus."""
    return f"{x:+.4f}".replace("-", "−")


def table(results, task):
    """Return the Markdown lines of a task's table."""
    setup = results["tasks"][task]
    matrices = sum(len(names) for names in setup["on spheres"].values())
    share = setup["entries on spheres"] / setup["parameters"]
    specs = ", ".join(f"{len(names)} by {spec}" for spec, names in setup["on spheres"].items())
    lines = [
        f"### {TITLES[task]}",
        "",
        f"{setup['data']}; {setup['steps']} steps of {setup['batch']}; {setup['parameters']:,} "
        f"parameters, {share:.0%} of them on spheres ({matrices} tensors: {specs}); all else at "
        f"lr {setup['ordinary lr']:g} in every arm.",
        "",
        "| arm | best lr | held-out loss | minus the centre's (95 %) | at half, double lr | "
        "training loss | accuracy | angle half-way |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = summaries(results, task)
    middle = found[CENTRE[setup["family"]]]
    for name, s in found.items():
        near = [
            signed(s["losses"][x] - s["losses"][s["lr"]]) if x in s["losses"] else "–"
            for x in (s["lr"] / 2, s["lr"] * 2)
        ]
        apart = "centre" if s is middle else interval(difference(s["final"], middle["final"]))
        mean = s["mean"]
        lines.append(
            f"| {name} | {s['lr']:g} | {mean['held-out loss']:.4f} | {apart} | "
            f"{', '.join(near)} | {mean['training loss']:.4f} | {mean['accuracy']:.4f} | "
            f"{mean['angle, half-way']:.4f} |"
        )
    return [*lines, "", against_torch(found), ""]


def interval(figures):
    """Return a difference as text; the number of seeds where it is not the usual one."""
    mean, half, count = figures
    return f"{signed(mean)} ± {half:.4f}" + (f" (n={count})" if count != len(REPORT) else "")


def against_torch(found):
    """Return the line that holds the fixed angle to the best of torch's arms."""
    names = [name for name in found if name.startswith("torch")]
    best = min(names, key=lambda name: min(found[name]["losses"].values()))
    figures = difference(found["rotate, project"]["final"], found[best]["final"])
    return (
        f"`rotate, project` minus `{best}`, torch's best on the seeds to choose on: "
        f"{interval(figures)}."
    )


def cost_table(costs):
    """Return the Markdown lines of what a step costs."""
    lines = []
    for workload, found in costs.items():
        first = next(iter(found))
        lines += [
            f"### Cost of a step: {workload}",
            "",
            f"| arm | processor time / that of {first} | operations dispatched |",
            "| --- | --- | --- |",
            *(f"| {name} | {x['ratio']:.2f} | {x['operations']} |" for name, x in found.items()),
            "",
        ]
    return lines


def text(results):
    """Return all tables as Markdown."""
    lines = [line for task in TITLES if task in results["tasks"] for line in table(results, task)]
    lines += cost_table(results.get("cost", {}))
    about = results["about"]
    return "\n".join(
        [
            *lines,
            f"`{about['command']}`: "
            + ", ".join(f"{key} {value}" for key, value in about.items() if key != "command")
            + ".",
        ]
    )


def colour(name, family):
    """Return the colour of an arm: torch, another move, or another transport or projection."""
    if name.startswith("torch"):
        return GREY
    return BLUE if name.startswith(CENTRE_MOVE[family]) else ORANGE


def draw(results, path):
    """Write the picture: the difference of each arm from the centre arm, with its interval.

    Blue arms have the centre's move, orange ones another, grey ones are torch's.
    """
    found = {task: summaries(results, task) for task in TITLES if task in results["tasks"]}
    sizes = [len(shown) + 3 for shown in found.values()]
    figure, axes = plt.subplots(
        len(found),
        1,
        figsize=(7.5, 0.17 * sum(sizes)),
        layout="constrained",
        squeeze=False,
        height_ratios=sizes,
    )
    for ax, (task, shown) in zip(axes[:, 0], found.items(), strict=True):
        family = task.split("-")[1]
        middle = shown[CENTRE[family]]["final"]
        for y, (name, s) in enumerate(shown.items()):
            if s["final"] is middle:
                ax.plot(0, y, "|", color="black")
                continue
            mean, half, _ = difference(s["final"], middle)
            if abs(mean) > FRAME:  # runs that failed would flatten all other arms
                ax.text(FRAME, y, f"{signed(mean)} →", ha="right", va="center", fontsize=7)
                continue
            ax.errorbar(mean, y, xerr=half, fmt="o", color=colour(name, family), ms=4, lw=1.2)
        ax.set_yticks(range(len(shown)), list(shown), fontsize=7)
        ax.set_ylim(len(shown) - 0.3, -0.7)
        ax.axvline(0, color="black", lw=0.6)
        ax.set_xlim(-FRAME, FRAME)
        ax.set_title(TITLES[task], fontsize=9, loc="left")
        ax.set_xlabel("held-out loss minus the centre arm's, nats (left is better)", fontsize=7)
        ax.tick_params(axis="x", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("docs/results/ablation.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/ablation.md"))
    parser.add_argument("--svg", type=Path, default=Path("docs/results/ablation.svg"))
    parser.add_argument("--print", action="store_true", help="only print the tables")
    args = parser.parse_args()
    results = json.loads(args.json.read_text())
    tables = text(results)
    print(tables)
    if args.print:
        return
    before, rest = args.page.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    args.page.write_text(f"{before}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{after}")
    mpl.rcParams["svg.hashsalt"] = "sphereopt"
    draw(results, args.svg)


if __name__ == "__main__":
    main()
