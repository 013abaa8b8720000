"""The propagation page runs, and its figures are those that were measured."""

import json
import re
from pathlib import Path

import pytest

from sphereopt.diagnostics import findings

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/diagnostics/propagation.md").read_text()


def results(name):
    return json.loads((ROOT / f"docs/results/{name}.json").read_text())


def test_the_page_runs_and_prints_what_it_says(capsys):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    out = capsys.readouterr().out
    for shown in re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL):
        assert shown.strip() in out


def measured():
    """Return the lines of the page's tables, from the results."""
    for row in results("propagation")["rows"]:
        numbers = [row[key] for key in ("similarity", "stable rank", "explosion", "training loss")]
        cells = [f"{x:.2f}" for x in numbers]
        yield f"| {row['normalizer']} | {' | '.join(cells)} | {row['spread']:.2f} |"


@pytest.mark.parametrize("line", list(measured()))
def test_the_table_is_what_was_measured(line):
    assert line in PAGE


def test_the_cost_is_what_was_measured():
    for row in results("propagation_cost")["rows"]:
        assert f"{row['ratio']:.1f} times with {row['batch']} samples" in PAGE


def test_the_thresholds_are_those_of_the_code():
    assert f"the cosine is at least {findings.SIMILAR}" in PAGE
    assert f"the variance changes {findings.GROWING:.0f} times" in PAGE
    assert f"beyond {findings.EXPLODING:.0f} or below 1/{findings.EXPLODING:.0f}" in PAGE
    assert findings.DEAD == 0.5
    assert "at least half of a layer's channels" in PAGE
