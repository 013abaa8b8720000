"""The ablation's own arithmetic: arms made by hand against the library's, and when it is done."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation

    return ablation


@pytest.fixture
def tasks(ablation):
    import ablation_tasks

    return ablation_tasks


@pytest.mark.parametrize("how", ["project", "parallel", "rescale"])
@pytest.mark.parametrize("name", ["conv-sgd", "gpt-adam"])
def test_projecting_and_carrying_by_hand_is_the_librarys_transport(ablation, tasks, name, how):
    task = dataclasses.replace(tasks.make(name, "digits", ""), steps=12, batch=4)
    task = dataclasses.replace(task, held_out=tuple(x[:64] for x in task.held_out))
    move = ablation.CENTRE_MOVE[task.family]
    arms = (
        ablation.Arm("library", move, how),
        ablation.Arm("by hand", move, project=True, carry=how),
        ablation.Arm("neither", move),
    )
    losses = [ablation.run(task, arm, 0.1, 0)["held-out loss"] for arm in arms]
    # Twelve float32 steps of 0.1 rad: some 1e-6 of rounding each, and what training makes of it.
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0] != pytest.approx(losses[2], abs=2e-4)


def test_a_grid_grows_until_the_best_lr_is_inside_and_then_fresh_seeds_run(ablation):
    arm = ablation.Arm("one", "rotate", "project")
    rows, asked = [], []
    while wanted := ablation.wanted("adam", arm, rows):
        asked += wanted
        rows += [{"lr": lr, "seed": s, "held-out loss": abs(lr - 0.005)} for lr, s in wanted]
    chosen = [lr for lr, seed in asked if seed == 0]
    assert chosen == [0.01, 0.02, 0.04, 0.005, 0.0025]
    assert [seed for lr, seed in asked if lr == 0.005] == [*ablation.CHOOSE, *ablation.REPORT]
    assert len(asked) == len(set(asked)) == 3 * 5 + 5


def test_a_diverged_run_is_the_worst(ablation):
    rows = [
        {"lr": lr, "seed": seed, "held-out loss": None if (lr, seed) == (0.1, 2) else lr}
        for lr in (0.1, 0.2)
        for seed in ablation.CHOOSE
    ]
    assert ablation.best_lr(rows) == 0.2


def test_finished_runs_are_in_the_file_at_once(ablation, tmp_path):
    path = tmp_path / "ablation.json"
    results = ablation.Results(path, {"torch": "2"})
    results.declare("conv-sgd", {"steps": 5})
    results.add({"task": "conv-sgd", "arm": "one", "lr": 0.1, "seed": 0, "held-out loss": 1.0})
    again = ablation.Results(path, {})
    assert again.content == results.content
    again.declare("conv-sgd", {"steps": 5})
    with pytest.raises(SystemExit, match="other steps"):
        again.declare("conv-sgd", {"steps": 6})


def test_every_figure_of_the_page_is_that_of_the_results(ablation):
    import ablation_table

    results = json.loads((ROOT / "docs/results/ablation.json").read_text())
    page = (ROOT / "docs/ablation.md").read_text()
    text = ablation_table.text(results)
    first, last = ablation_table.MARKS
    assert page.split(first)[1].split(last)[0].strip() == text.strip()
    claimed = re.findall(r"[−+]0\.\d{4} ± 0\.\d{4}", page.split("## Set-up")[0])
    assert len(claimed) == 10
    assert all(figure in text for figure in claimed)
