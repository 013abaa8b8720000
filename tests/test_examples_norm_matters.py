"""examples/norm_matters_weight_decay.py: arms are what they say, and the page what was found."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sphereopt as so
from sphereopt.train import DivergedError, OptionError

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples/norm_matters_weight_decay.py"
PAGE = ROOT / "docs/examples/norm_matters_weight_decay.md"
RESULTS = ROOT / "docs/results/norm_matters_weight_decay.json"
#: Without eps in sight: a decay that matters within a dozen steps, on few images.
TOY = {"steps": 12, "width": 2, "train_images": 64, "progress": False, "weight_decay": 0.05}
CONV = "0.weight"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import norm_matters_weight_decay

    return norm_matters_weight_decay


def rows_of(tmp_path, name=CONV):
    return [row["parameters"][name] for row in so.monitor.read_jsonl(tmp_path / "run.jsonl")]


def test_free_is_decay_on_spheres(example):
    decay, free = (example.run(**TOY, arm=arm) for arm in ("decay", "free"))
    # The same run in exact arithmetic; BatchNorm's eps and rounding grow for 12 steps.
    assert free["train_loss"] == pytest.approx(decay["train_loss"], rel=1e-2)
    for name, rows in decay["norms"].items():
        assert rows.shape[0] == 13
        torch.testing.assert_close(free["norms"][name], rows, rtol=1e-2, atol=0)


def test_decay_shrinks_norms_and_its_absence_does_not(example):
    decay, plain = (example.run(**TOY, arm=arm)["norms"] for arm in ("decay", "no decay"))
    for name, rows in plain.items():
        assert torch.all(rows[1:] >= rows[:-1] * (1 - 1e-3)), name  # momentum may point inwards
        assert decay[name][-1].mean() < rows[-1].mean()


def test_the_lr_correction_believes_the_recorded_norms(example):
    decay = example.run(**TOY)["norms"]
    told = example.run(**TOY, arm="lr correction", norms=decay)
    itself = example.run(**TOY, arm="lr correction")
    for name, rows in told["norms"].items():
        torch.testing.assert_close(rows, decay[name], rtol=0, atol=0)
    assert told["curve"] == itself["curve"]  # without norms it records them first


def test_the_norm_schedule_raises_norms_where_lr_would_drop(example, tmp_path):
    decay = example.run(**TOY)["norms"]
    found = example.run(**TOY, arm="norm schedule", norms=decay, out=tmp_path)["norms"]
    for name, rows in found.items():
        for step in range(13):
            wanted = decay[name][3] * math.sqrt(10) ** min(3, 4 * step // 12)
            # Stored in float32 once, when the weights were given these norms.
            torch.testing.assert_close(rows[step], wanted, rtol=1e-6, atol=0)
    assert {row["lr"] for row in rows_of(tmp_path)} == {example.LR}


def test_fixed_turns_by_the_calculators_angle_at_constant_norm(example, tmp_path):
    found = example.run(**TOY, arm="fixed", out=tmp_path)
    settled = so.theory.equilibrium("sgd", lr=0.05, weight_decay=0.05, momentum=0.9)
    angles = [row["angle"]["mean"] for row in rows_of(tmp_path)]
    drops = [0.1 ** (step // 3) for step in range(12)]
    assert angles == pytest.approx([settled.angle * x for x in drops], rel=1e-3)  # float32
    for rows in found["norms"].values():
        torch.testing.assert_close(rows[-1], rows[0], rtol=1e-6, atol=0)


def test_all_arms_start_from_the_same_weights_and_batches(example, tmp_path, monkeypatch):
    monkeypatch.setattr(so.report, "write", lambda log, page: None)  # a second each
    runs = example.all_arms(range(2), tmp_path, TOY)
    assert [(r["seed"], r["arm"]) for r in runs] == [(s, a) for s in (0, 1) for a in example.ARMS]
    first = {
        (r["seed"], r["arm"]): so.monitor.read_jsonl(
            tmp_path / f"{r['arm'].replace(' ', '_')}-{r['seed']}" / "run.jsonl"
        )[0]["metrics"]["loss"]
        for r in runs
    }
    for seed in (0, 1):
        # The norm schedule's weights have other norms: BatchNorm's eps weighs a little otherwise.
        losses = [first[seed, arm] for arm in example.ARMS]
        assert losses == pytest.approx([losses[0]] * 6, rel=1e-3)
    assert first[0, "decay"] != first[1, "decay"]
    # Means of the last half quarter before the drop, and of the last eighth.
    run = runs[0]
    assert run["before_drop"] == np.mean([run["curve"][i][2] for i in (1, 2)])
    assert run["valid_accuracy"] == np.mean([run["curve"][i][2] for i in (10, 11)])


def test_colour_images_with_channels_last_are_averaged_to_16_pixels(example, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(40) % 3
    parts = {"train_images": images, "train_labels": labels}
    np.savez(tmp_path / "x.npz", **parts, test_images=images, test_labels=labels)
    options = {"data": tmp_path / "x.npz", "device": "cpu", "train_images": 30, "pixels": 16}
    (train, valid), classes = example.images(options)
    assert (train[0].shape, valid[0].shape, classes) == ((30, 3, 16, 16), (40, 3, 16, 16), 3)
    raw = images[0, :2, :2, 1].mean()
    mean, std = images.mean(), images.std()
    assert train[0][0, 1, 0, 0].item() == pytest.approx((raw - mean) / std, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arm": "weight decay"}, "arm='weight decay': use one of decay, no decay"),
        ({"steps": 0}, "steps='0'"),
        ({"lr": 0.0, "weight_decay": None}, "lr='0.0': must be a positive number"),
        ({"weight_decay": -1.0}, "weight_decay='-1.0'"),
        ({"width": 0}, "width='0'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"data": "no/such/folder"}, "there is no such folder or file"),
    ],
)
def test_options_that_cannot_be_used_leave_nothing(example, options, words, tmp_path):
    with pytest.raises(OptionError, match=words):
        example.run(**{**TOY, "out": tmp_path / "out", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_logged(example, tmp_path):
    with pytest.raises(DivergedError, match=r"at step \d+; use a smaller lr"):
        example.run(**{**TOY, "lr": 1e38, "weight_decay": 1e-38}, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]


def test_the_script_prints_a_table_and_writes_results_and_picture(tmp_path):
    toy = ["--steps", "12", "--width", "1", "--train-images", "32"]
    command = [sys.executable, SCRIPT, *toy, "--seeds", "2", "--json", tmp_path / "r.json"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "norm schedule" in found.stdout
    results = json.loads((tmp_path / "r.json").read_text())
    assert len(results["runs"]) == 12
    assert results["about"]["command"].startswith(
        "python examples/norm_matters_weight_decay.py --s"
    )
    assert "<svg" in (tmp_path / "r.svg").read_text()


def test_a_wrong_option_is_one_line_and_exit_code_2(example, tmp_path, capsys):
    (tmp_path / "empty.npz").write_bytes(b"")
    assert example.main(["--data", str(tmp_path / "empty.npz")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("norm_matters_weight_decay.py: error: --data")


def test_intervals_are_students(example):
    # Mean 2, standard deviation 1, n = 3: 4.30 / sqrt(3).
    assert example.interval([1.0, 2.0, 3.0], 1.0) == "2.00 ± 2.48"
    assert example.interval([0.5]) == "50.00"


def test_the_page_says_what_was_measured(example):
    results, page = json.loads(RESULTS.read_text()), PAGE.read_text()
    for arm in example.ARMS:
        cells = " | ".join(example.cells(results["runs"], arm)).replace("-", "−")
        assert f"| {cells} |" in page
    assert results["about"]["command"] in page
