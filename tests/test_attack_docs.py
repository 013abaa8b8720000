"""The attack page runs, and its figures are those that were measured."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/diagnostics/attack.md").read_text()


def test_the_page_runs(capsys):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    assert "(output)" in capsys.readouterr().out
    assert [row.weight for row in names["found"].rows] == ["0.weight", "3.weight"]


def measured():
    """Return the lines of the page's tables, from the results."""
    results = json.loads((ROOT / "docs/results/attack.json").read_text())
    rows = {"| SGD, weights x 2, averages stale |": [results["stale"]]}
    for arm, lr in results["best lr"].items():
        name = f"| {arm}, lr {lr} |"
        rows[name] = [r for r in results["rows"] if (r["arm"], r["lr"]) == (arm, lr)]
    for name, runs in rows.items():
        shares = [fmean(r[key] for r in runs) for key in ("clean", "FGSM", "PGD")]
        growth = fmean(x for r in runs for x in r["norm growth"])
        kappas = [
            fmean(r["attack"][key][-1] for r in runs)
            for key in ("before", "after, batch", "after, clean", "after, running")
        ]
        cells = [f"{growth:.1f}", *(f"{s:.1%}" for s in shares), *(f"{k:.3g}" for k in kappas)]
        yield f"{name} {' | '.join(cells)} |".replace("%", " %")


@pytest.mark.parametrize("line", list(measured()))
def test_the_table_is_what_was_measured(line):
    assert line in PAGE
