"""One HTML page that shows a comparison run, in one file, without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphereopt.monitor import read_jsonl
from sphereopt.report.comparison import figures
from sphereopt.report.comparison.summary import HEADER, arm_rows, layer_rows
from sphereopt.report.comparison.verdict import SAME, verdict
from sphereopt.report.svg import to_svg
from sphereopt.report.template import fill

__all__ = ["render", "write"]

Results = Mapping[str, Any]
Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def render(results: Results, rows: Rows) -> str:
    """Return the page of a comparison run.

    Args:
        results: Its results, as ``results.json`` holds them.
        rows: Arm name to the rows of its JSONL file.

    Returns:
        An HTML document that refers to nothing outside of itself; light or dark as the reader has
        it, printable, and readable on a phone.

    Raises:
        ImportError: If jinja2 or matplotlib is missing; the extra ``report`` brings them.
    """
    from markupsafe import Markup

    drawn = [
        {"name": name, "caption": caption, "svg": Markup(to_svg(figure, name, label))}
        for name, figure, label, caption in _figures(results, rows)
    ]
    return fill(
        "sphereopt.report.comparison",
        "page.html.jinja",
        results=results,
        verdict=verdict(results),
        header=HEADER,
        arms=arm_rows(results),
        layers=layer_rows(results, rows),
        first_step=next(iter(rows.values()))[0]["step"],
        last_step=next(iter(rows.values()))[-1]["step"],
        figures=drawn,
    )


def write(folder: str | Path) -> Path:
    """Write ``report.html`` from the files beside it.

    Args:
        folder: Holds ``results.json`` and the JSONL file of each arm.

    Returns:
        The path of the page.

    Raises:
        OSError: If a file is missing, or the page cannot be written.
        ImportError: If jinja2 or matplotlib is missing; the extra ``report`` brings them.
    """
    folder = Path(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = {name: read_jsonl(folder / f"{name}.jsonl") for name in results["arms"]}
    path = folder / "report.html"
    path.write_text(render(results, rows), encoding="utf-8")
    return path


def _figures(results: Results, rows: Rows) -> list[tuple[str, Any, str, str]]:
    """Return name, figure, label and caption of each figure."""
    return [*_sphere_figures(results, rows), *_curve_figures(results)]


def _sphere_figures(results: Results, rows: Rows) -> list[tuple[str, Any, str, str]]:
    count = results["sphere_count"]
    same = results["arms"]["free"]["norm_gap"] < SAME
    return [
        (
            "norms",
            figures.norms(results),
            "Norms of the spheres against steps",
            f"Median norm of the {count} spheres; the bands hold half of them. The virtual radius "
            f"of (b) {'lies on' if same else 'leaves'} the norm of (a). What (b) and (c) store "
            "stays where it began. Calculated: the growth law and weight decay, step by step, from "
            "(a)'s initial norms and the size of its gradients.",
        ),
        (
            "layers",
            figures.layers(results, rows),
            "Norms of the layers in (a) and (b) against steps",
            "Median over the spheres of each layer: the norm in (a), the virtual radius in (b).",
        ),
        (
            "angles",
            figures.angles(results),
            "Angle per step against steps, as measured, calculated, and at equilibrium",
            "How far a sphere turns in a step, mean over all spheres, at every logged step. Broad: "
            "where it would be had the norms settled at each learning rate; thin: calculated with "
            "the norms that follow late. The first steps, before the norms of (a) have grown, may "
            "leave the frame.",
        ),
    ]


def _curve_figures(results: Results) -> list[tuple[str, Any, str, str]]:
    shown = f"{results['curve_images']:,}"
    return [
        (
            "accuracy",
            figures.accuracy(results),
            "Test accuracy against steps",
            f"Test images classified correctly, of {shown}. Evaluation uses BatchNorm's running "
            "averages of past steps; in (a) the norms change meanwhile, so (a) and (b) may differ "
            "here where their training does not.",
        ),
        (
            "loss",
            figures.loss(results),
            "Training loss against steps",
            "Training loss, label smoothing included, averaged over stretches of the run.",
        ),
        (
            "gap",
            figures.loss_gap(results),
            "Difference of the training losses to that of (a), against steps",
            "Largest difference to (a)'s training loss in each stretch. (b) would be at zero in "
            "exact arithmetic and with a norm eps of zero.",
        ),
    ]
