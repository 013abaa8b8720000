"""The grid over the examples: its arithmetic on a function of known answer, and its page."""

import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "examples" / "first_table.md").read_text()


@pytest.fixture
def grid(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import lr_grid

    return lr_grid


def parabola(*, optimizer, seed, lr=None, weight_decay=None, progress, knob=0.0):
    """A run whose loss is smallest at lr 0.1 and weight decay 0.01; diverges at lr 10."""
    assert not progress
    lr = 1.0 if lr is None else lr
    if lr >= 10:
        raise RuntimeError("the loss is not finite")
    loss = abs(math.log10(lr) + 1) + abs((weight_decay or 0) - 0.01) + 0.1 * seed + knob
    return {"valid_loss": loss, "valid_accuracy": 0.5, "lr": lr}


def test_the_best_cell_is_run_again_with_all_seeds(grid):
    grids = {"SGD": grid.Grid((0.01, 0.1, 10.0), (0.0, 0.01)), "SphereSGD": grid.Grid((0.3, 10.0))}
    rows = grid.compare(parabola, grids, seeds=3, knob=1.0)
    best = rows["SGD"]["best"]
    assert (best["lr"], best["weight_decay"], rows["SGD"]["edge"]) == (0.1, 0.01, False)
    assert best["loss"] == pytest.approx(1.1)  # seeds 0, 1, 2 add 0, 0.1, 0.2
    assert best["loss_std"] == pytest.approx(0.1)
    assert "default" not in rows["SGD"]
    assert rows["SphereSGD"]["edge"]
    assert rows["SphereSGD"]["default"]["lr"] == 1.0
    assert [cell["valid_loss"] for cell in rows["SGD"]["cells"]].count(math.inf) == 2


def test_other_errors_end_the_search(grid):
    def broken(**_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        grid.compare(broken, {"SGD": grid.Grid((0.1,))}, seeds=1)


@pytest.mark.parametrize("task", ["image", "gpt"])
def test_the_tables_of_the_page_are_the_results(grid, task):
    found = json.loads((ROOT / "docs" / "results" / f"train_{task}_grid.json").read_text())
    rows = [grid.line(name, row) for name, row in found["results"].items()]
    table = PAGE.split(f"<!-- {task} -->\n")[1].split(f"<!-- end of {task} -->")[0]
    assert table.splitlines() == [*grid.HEAD.splitlines(), *rows]
    assert list(found["results"]) == list(grid.GRIDS[task])


def test_what_the_page_says_of_the_results_is_so(grid):
    results = {
        task: json.loads((ROOT / "docs" / "results" / f"train_{task}_grid.json").read_text())[
            "results"
        ]
        for task in ("image", "gpt")
    }
    for rows in results.values():
        for plain, sphere in (("SGD", "SphereSGD"), ("AdamW", "SphereAdam")):
            a, b = rows[plain]["best"], rows[sphere]["best"]
            assert abs(a["loss"] - b["loss"]) < 2 * max(a["loss_std"], b["loss_std"])
        others = [row["best"]["loss"] for name, row in rows.items() if name != "SphereMuon"]
        assert rows["SphereMuon"]["best"]["loss"] < min(others) - 0.02
        lost = [
            row["default"]["loss"] / row["best"]["loss"]
            for row in rows.values()
            if "default" in row
        ]
        assert all(1.15 < factor < 2.6 for factor in lost)
