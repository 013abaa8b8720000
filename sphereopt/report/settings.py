"""What the page says of a run's settings, and of what could not be measured."""

from __future__ import annotations

from typing import Any

from sphereopt.report.history import History
from sphereopt.report.instruments import HEAT_MAP, INSTRUMENTS, has
from sphereopt.report.words import plain

__all__ = ["groups_table", "missing", "runs_list"]

_GROUPS = 60
_FIRST = ("sphere", "kind", "radius", "move", "lr", "weight_decay", "momentum", "betas")
_WHY = {
    "equilibrium_norm": "nothing settles without weight decay or on spheres of fixed radius, and "
    "the calculator does not know every optimizer",
    "equilibrium_angle": "nothing settles without weight decay, and the calculator does not know "
    "every optimizer",
    "K_measured": "it needs weight decay, norms that may change, and an optimizer that the "
    "calculator knows",
    "growth_law": "it needs norms that may change and an optimizer that the calculator knows",
    "diffusive_angle": "it takes a whole window of steps, and is sampled",
}


def runs_list(history: History) -> list[list[tuple[str, str]]]:
    """Return name and value of what each header says, a run and its resumes in order."""
    return [_run(run) for run in history.runs]


def _run(run: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        (key, run.get(key)) for key in ("time", "start", "optimizer", "rule", "device", "window")
    ]
    every = run.get("every")
    shown = [(key, plain(value)) for key, value in facts if value is not None]
    if isinstance(every, dict):
        steps = ", ".join(f"{n} from step {start}" for start, n in every.items())
        shown.append(("logged every", steps))
    for part in ("versions", "config"):
        found = run.get(part)
        shown += [(str(k), plain(v)) for k, v in found.items()] if isinstance(found, dict) else []
    return [*shown, ("sphereopt", plain(run.get("sphereopt")))]


def groups_table(history: History) -> tuple[list[str], list[list[str]], int]:
    """Return heading, rows, and how many were left out, of the last header's groups."""
    groups = history.runs[-1].get("groups", []) if history.runs else []
    if not groups:
        return [], [], 0
    others = sorted({key for group in groups for key in group} - {"names", *_FIRST})
    keys = [k for k in (*_FIRST, *others) if any(group.get(k) is not None for group in groups)]
    rows = [
        [_members(group.get("names", ())), *(plain(group.get(key)) for key in keys)]
        for group in groups[:_GROUPS]
    ]
    return ["parameters", *(k.replace("_", " ") for k in keys)], rows, len(groups) - len(rows)


def _members(names: list[str]) -> str:
    shown = ", ".join(names[:2])
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown


def missing(history: History) -> list[str]:
    """Return sentences on what the log does not have, and what was done to it."""
    said = [note[:1].upper() + note[1:].rstrip(".") + "." for note in history.notes]
    asked = _said_probes(history)
    beside = [one.beside for one in INSTRUMENTS.values() if one.beside and has(history, one)]
    absent = [one.probe for one in (*INSTRUMENTS.values(), HEAT_MAP) if not has(history, one)]
    absent += [probe for probe in beside if probe not in history.values]
    if asked is None and absent:
        said.append(f"Not in this log, which has no header: {', '.join(absent)}.")
        absent = []
    for probe in absent:
        why = _WHY.get(probe, "no layer gave a number")
        said.append(f"{probe}: {why if asked and probe in asked else 'the tracker was not asked'}.")
    if not history.runs:
        said.append("Settings, versions and dates, which the header would say.")
    gap = history.steps[1] - history.steps[0] if len(history.steps) > 1 else 1
    if history.steps[0] > gap:
        said.append(f"Steps before {history.steps[0]:,} are not in the log.")
    return [*said, "Parameters that are not on spheres are not tracked."]


def _said_probes(history: History) -> set[str] | None:
    probes = [run["probes"] for run in history.runs if isinstance(run.get("probes"), list)]
    return {probe for some in probes for probe in some} if probes else None
