"""The grid over the examples: its arithmetic on a function of known answer, and its page."""

import json
import math
from pathlib import Path

import pytest

import sphereopt as so

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "examples" / "first_table.md").read_text()


@pytest.fixture
def grid(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import lr_grid

    return lr_grid


def parabola(*, optimizer, seed, lr=None, weight_decay=None, progress, knob=0.0, own=0.0):
    """A run whose loss is smallest at lr 0.1 and weight decay 0.01; diverges at lr 10."""
    assert not progress
    assert (own != 0) == (optimizer == "SphereSGD" and lr is not None), "of cells, not of defaults"
    lr = 1.0 if lr is None else lr
    if lr >= 10:
        raise RuntimeError("the loss is not finite")
    loss = abs(math.log10(lr) + 1) + abs((weight_decay or 0) - 0.01) + 0.1 * seed + knob + own
    return {"valid_loss": loss, "valid_accuracy": 0.5, "lr": lr}


def test_the_best_cell_is_run_again_with_all_seeds(grid):
    grids = {
        "SGD": grid.Grid((0.01, 0.1, 10.0), (0.0, 0.01)),
        "SphereSGD": grid.Grid((0.3, 10.0), knobs=(("own", 0.5),)),
    }
    rows = grid.compare(parabola, grids, seeds=3, knob=1.0)
    best = rows["SGD"]["best"]
    assert (best["lr"], best["weight_decay"], rows["SGD"]["edge"]) == (0.1, 0.01, False)
    assert best["loss"] == pytest.approx(1.1)  # seeds 0, 1, 2 add 0, 0.1, 0.2
    assert best["loss_std"] == pytest.approx(0.1)
    assert "default" not in rows["SGD"]
    assert rows["SphereSGD"]["edge"]
    assert rows["SphereSGD"]["default"]["lr"] == 1.0
    losses = [rows["SphereSGD"][key]["loss"] for key in ("best", "default")]
    # Cells have the knob of their own; the seeds add 0.1.
    assert losses == pytest.approx([math.log10(3) + 0.01 + 1.1 + 0.5, 1 + 0.01 + 1.1])
    assert grid.line("SphereSGD", rows["SphereSGD"]).endswith("| 2.110 ± 0.100 (+1.1%) |")
    assert [cell["valid_loss"] for cell in rows["SGD"]["cells"]].count(math.inf) == 2


def test_other_errors_end_the_search(grid):
    def broken(**_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        grid.compare(broken, {"SGD": grid.Grid((0.1,))}, seeds=1)


RESULTS = {
    name: json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    for name in (
        *("train_image_grid", "train_gpt_grid"),
        *("train_image_cifar_grid", "train_image_cifar_group_grid"),
        *("train_gpt_shakespeare_grid", "train_gpt_long_grid"),
    )
}
OURS = ["SphereSGD", "SphereAdam", "SphereLion", "SphereMuon"]


@pytest.mark.parametrize("name", RESULTS)
def test_the_tables_of_the_page_are_the_results(grid, name):
    rows = [grid.line(*row) for row in RESULTS[name]["results"].items()]
    table = PAGE.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
    assert table.splitlines() == [*grid.HEAD.splitlines(), *rows]
    first = name in ("train_image_grid", "train_gpt_grid")
    wanted = ["SGD", "AdamW", *OURS] if first else OURS
    assert list(RESULTS[name]["results"]) == [
        x for x in wanted if "long" not in name or x != "SphereLion"
    ]


def test_what_the_page_says_of_the_results_is_so(grid):
    for name in ("train_image_grid", "train_gpt_grid"):
        rows = RESULTS[name]["results"]
        for plain, sphere in (("SGD", "SphereSGD"), ("AdamW", "SphereAdam")):
            a, b = rows[plain]["best"], rows[sphere]["best"]
            assert abs(a["loss"] - b["loss"]) < 2 * max(a["loss_std"], b["loss_std"])
        others = [row["best"]["loss"] for key, row in rows.items() if key != "SphereMuon"]
        assert rows["SphereMuon"]["best"]["loss"] < min(others) - 0.02
    for name, found in RESULTS.items():
        for optimizer in set(OURS) & found["results"].keys():
            row = found["results"][optimizer]
            apart = row["default"]["loss"] / row["best"]["loss"] - 1
            if "group" not in name or optimizer == "SphereMuon":
                assert apart < 0.05, (name, optimizer)
            else:
                assert 0.09 < apart < 0.12, optimizer
                assert row["best"]["lr"] <= 0.01
            assert row["default"]["lr"] == getattr(so, optimizer).default_angle


def test_results_that_are_there_stay_if_they_are_of_the_same_command(grid, tmp_path):
    path = tmp_path / "grid.json"
    assert grid.former(path, "this") == {} == grid.former(None, "this")
    path.write_text(json.dumps({"about": {"command": "this"}, "results": {"SGD": 1}}))
    assert grid.former(path, "this") == {"SGD": 1}
    with pytest.raises(SystemExit, match="has results of this; name another"):
        grid.former(path, "that")
