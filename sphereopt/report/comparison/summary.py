"""The numbers of a comparison run as short strings, for terminals and pages alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sphereopt.report.words import number

__all__ = ["HEADER", "arm_rows", "layer_rows", "number"]

Results = Mapping[str, Any]
Rows = Mapping[str, Sequence[Mapping[str, Any]]]

HEADER = (
    "arm",
    "optimizer",
    "test accuracy",
    "norm, start → end",
    "angle per step",
    "predicted",
    "|loss − loss(a)|",
)


def arm_rows(results: Results) -> list[tuple[str, ...]]:
    """Return the table of the arms.

    Args:
        results: A comparison run's results, as its ``results.json`` holds them.

    Returns:
        One row per arm, with the columns of :data:`HEADER`. Norms are medians over all spheres;
        angles means over the second half of the logged steps, in radians; the last column is the
        largest difference over all steps.
    """
    return [
        (
            f"({arm['letter']}) {name}",
            arm["optimizer"],
            f"{100 * arm['test_accuracy']:.1f} %",
            _norm_cell(arm),
            f"{arm['angle']:.5f}",
            f"{arm['predicted_angle']:.5f}",
            "" if index == 0 else number(arm["loss_gap"]),
        )
        for index, (name, arm) in enumerate(results["arms"].items())
    ]


def _norm_cell(arm: Mapping[str, Any]) -> str:
    start, end = arm["norms"][0], arm["norms"][-1]
    believed, stored = (
        f"{start[kind]['median']:.3f} → {end[kind]['median']:.3f}"
        for kind in ("believed", "stored")
    )
    return stored if believed == stored else f"{believed} virtual\n{stored} stored"


def layer_rows(results: Results, rows: Rows) -> list[dict[str, Any]]:
    """Return what each layer did in each arm.

    Args:
        results: A comparison run's results.
        rows: Arm name to the rows of its JSONL file.

    Returns:
        One entry per layer: ``name``, ``sphere``, ``count``, and ``arms``, a list of (norm at the
        first logged step, norm at the last, mean angle over the second half), as strings.
    """
    table = []
    for name, sphere in results["spheres"].items():
        cells = [_layer_cells(name, rows[arm], results) for arm in results["arms"]]
        count = rows[next(iter(results["arms"]))][0]["parameters"][name]["count"]
        table.append({"name": name, "sphere": sphere, "count": count, "arms": cells})
    return table


def _layer_cells(
    name: str, rows: Sequence[Mapping[str, Any]], results: Results
) -> tuple[str, str, str]:
    entries = [row["parameters"][name] for row in rows]
    late = [
        row["parameters"][name]["angle"]["mean"]
        for row in rows
        if row["step"] > results["config"]["steps"] // 2
    ]
    start, end = (f"{entry['norm']['median']:.3f}" for entry in (entries[0], entries[-1]))
    return start, end, f"{math.fsum(late) / len(late):.5f}"
