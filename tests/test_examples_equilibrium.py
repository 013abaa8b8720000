"""examples/equilibrium.py: what it compares is what happened, and its page says what it found."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sphereopt as so
from sphereopt.train import DivergedError, OptionError

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples/equilibrium.py"
NAMES = ["SGD", "AdamW", "Lion", "Muon"]
PAGE = ROOT / "docs/examples/equilibrium.md"
RESULTS = ROOT / "docs/results/equilibrium.json"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import equilibrium

    return equilibrium


@pytest.mark.parametrize("optimizer", NAMES)
def test_every_optimizer_is_compared_on_both_matrices(example, optimizer, tmp_path):
    found = example.run(optimizer=optimizer, steps=40, progress=False, out=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(example.FILES)
    assert list(found["matrices"]) == ["1.weight", "4.weight"]
    for m in found["matrices"].values():
        assert m["steps"] == list(range(1, 41))
        for key in ("angle", "norm"):
            assert m[key]["ratio"] == m[key]["predicted"] / m[key]["measured"]
            assert 0.2 < m[key]["predicted line"][-1] / m[key]["measured line"][-1] < 5
    rows = so.monitor.read_jsonl(tmp_path / "run.jsonl")
    last = rows[-1]["parameters"]["1.weight"]["norm"]["median"]
    assert last == pytest.approx(found["matrices"]["1.weight"]["norm"]["measured line"][-1])
    losses = [row["metrics"]["loss"] for row in rows][-4:]
    assert found["train_loss"] == pytest.approx(sum(losses) / 4)


def test_sgd_settles_where_theory_says(example):
    # A memory of 100 steps: norms settle in some 25, and 700 of 1400 steps are 7 memories long.
    found = example.run(steps=1400, lr=0.1, weight_decay=0.01, progress=False)
    wanted = math.sqrt(2 * 0.1 * 0.01 / 1.9)
    for m in found["matrices"].values():
        # A percent on long runs (docs/theory/networks.md); seven memories leave a few.
        assert m["angle"]["measured"] == pytest.approx(wanted, rel=0.05)
        assert m["angle"]["predicted"] == pytest.approx(wanted, rel=0.03)  # leading order
        assert m["norm"]["ratio"] == pytest.approx(1, rel=0.1)


def test_the_same_seed_gives_the_same_run_and_leaves_torchs_generator_alone(example, monkeypatch):
    state = torch.get_rng_state()
    first, again = (example.run(steps=20, progress=False) for _ in range(2))
    other = example.run(steps=20, seed=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    # Another seed is another network, and other batches.
    norms = [r["matrices"]["1.weight"]["norm"]["measured line"][0] for r in (first, other)]
    assert norms[0] != norms[1]
    network = example.network
    monkeypatch.setattr(example, "network", lambda *a: (torch.manual_seed(0), network(*a))[1])
    losses = [example.run(steps=20, seed=seed, progress=False)["train_loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    assert first["matrices"] == again["matrices"]
    assert first["train_loss"] == again["train_loss"] != other["train_loss"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "Adagrad"}, "optimizer='Adagrad': use one of SGD, AdamW, Lion, Muon"),
        ({"steps": 0}, "steps='0'"),
        ({"lr": -1.0}, "lr='-1.0': must be a positive number"),
        ({"lr": 1e39}, r"lr='1e\+39': must be a positive number"),
        ({"weight_decay": math.nan}, "weight_decay='nan'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"data": "no/such.npz"}, "there is no such folder or file"),
    ],
)
def test_options_that_cannot_be_used_leave_nothing(example, options, words, tmp_path):
    with pytest.raises(OptionError, match=words):
        example.run(**{"steps": 20, "progress": False, "out": tmp_path / "out", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_logged(example, tmp_path):
    with pytest.raises(DivergedError, match=r"at step \d+; use a smaller lr"):
        example.run(lr=1e38, weight_decay=1e-30, steps=40, progress=False, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]
    assert len(so.monitor.read_jsonl(tmp_path / "run.jsonl")) >= 1


def test_the_script_prints_a_table_and_writes_results_and_picture(tmp_path):
    options = ["--steps", "20", "--seed", "3", "--seeds", "2", "--json", tmp_path / "r.json"]
    command = [sys.executable, SCRIPT, *options, "--out", tmp_path / "out"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert all(name in found.stdout for name in NAMES)
    results = json.loads((tmp_path / "r.json").read_text())
    assert [r["optimizer"] for r in results["runs"]] == 2 * NAMES
    assert [r["seed"] for r in results["runs"]] == [3] * 4 + [4] * 4
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders == sorted(f"{name}-{seed}" for name in NAMES for seed in (3, 4))
    assert results["about"]["torch"] == torch.__version__
    assert "<svg" in (tmp_path / "r.svg").read_text()


def test_a_wrong_option_is_one_line_and_exit_code_2(example, tmp_path, capsys):
    (tmp_path / "empty.npz").write_bytes(b"")
    assert example.main(["--data", str(tmp_path / "empty.npz"), "--steps", "20"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("equilibrium.py: error: --data")


def test_cells_are_means_and_deviations_over_seeds(example):
    def result(optimizer, measured):
        entry = {"predicted": 2.0, "measured": measured, "ratio": 2 / measured}
        return {"optimizer": optimizer, "matrices": {"w": {"angle": entry, "norm": entry}}}

    one, two = result("SGD", 1.0), result("SGD", 4.0)
    assert example.cells([one, result("Lion", 7.0)], "SGD", "w")[2:5] == [
        "2000.000",
        "1000.000",
        "2.000",
    ]
    wanted = [
        "SGD",
        "w",
        "2000.000",
        "2500.000",
        "1.250 ± 1.061",
        "2.000",
        "2.500",
        "1.250 ± 1.061",
    ]
    assert example.cells([one, two], "SGD", "w") == wanted


def test_the_page_says_what_was_measured(example):
    results, page = json.loads(RESULTS.read_text()), PAGE.read_text()
    assert [r["seed"] for r in results["runs"]] == [0] * 4 + [1] * 4 + [2] * 4
    for optimizer, name in itertools.product(NAMES, results["runs"][0]["matrices"]):
        assert f"| {' | '.join(example.cells(results['runs'], optimizer, name))} |" in page
    assert results["about"]["command"] in page
