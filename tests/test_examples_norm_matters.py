"""examples/norm_matters_weight_decay.py: arms are what they say, and the page what was found."""

import itertools
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
    assert {row["lr"] for row in rows_of(tmp_path)} == {example.Options.lr}


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
    runs = [r for s in (0, 1) for r in example.all_arms(s, tmp_path / str(s), TOY)]
    assert [(r["seed"], r["arm"]) for r in runs] == [(s, a) for s in (0, 1) for a in example.ARMS]
    first = {
        (r["seed"], r["arm"]): so.monitor.read_jsonl(
            tmp_path / str(r["seed"]) / r["arm"].replace(" ", "_") / "run.jsonl"
        )[0]["metrics"]["loss"]
        for r in runs
    }
    for seed in (0, 1):
        # The norm schedule's weights have other norms: BatchNorm's eps weighs a little otherwise.
        losses = [first[seed, arm] for arm in example.ARMS]
        assert losses == pytest.approx([losses[0]] * 6, rel=1e-3)
    assert first[0, "decay"] != first[1, "decay"]
    norms = {(r["seed"], r["arm"]): r["norms"][CONV] for r in runs}
    assert not torch.equal(norms[0, "decay"][0], norms[1, "decay"][0])  # other initial weights
    for seed in (0, 1):  # which were those of decay, not of the arm before
        assert torch.equal(norms[seed, "lr correction"], norms[seed, "decay"])
        wanted = norms[seed, "decay"][3]  # stored in float32 once
        torch.testing.assert_close(norms[seed, "norm schedule"][0], wanted, rtol=1e-6, atol=0)
    # Means of the last half quarter before the drop, and of the last eighth.
    run = runs[0]
    assert run["before_drop"] == np.mean([run["curve"][i][2] for i in (1, 2)])
    assert run["valid_accuracy"] == np.mean([run["curve"][i][2] for i in (10, 11)])


def test_colour_images_with_channels_last_are_averaged_to_16_pixels(example, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(40) % 3
    parts = {"train_images": images, "train_labels": labels}
    np.savez(tmp_path / "x.npz", **parts, test_images=images, test_labels=labels)
    options = example.Options(data=str(tmp_path / "x.npz"), train_images=30)
    (train, valid), classes = example.images(options)
    assert (train[0].shape, valid[0].shape, classes) == ((30, 3, 16, 16), (40, 3, 16, 16), 3)
    raw = images[0, :2, :2, 1].mean()
    mean, std = images.mean(), images.std()
    assert train[0][0, 1, 0, 0].item() == pytest.approx((raw - mean) / std, rel=1e-4)


def test_batches_are_shifted_and_mirrored_images(example):
    x = torch.arange(1.0, 3 * 2 * 4 * 5 + 1).view(3, 2, 4, 5)
    o = example.Options(steps=8, shift=2)
    padded = torch.nn.functional.pad(x, [2] * 4)
    windows = {}
    for (image, y), top, left in itertools.product(
        zip(padded, range(3), strict=True), range(5), range(5)
    ):
        window = image[:, top : top + 4, left : left + 5]
        windows[tuple(window.flatten().tolist())] = (y, top, left, False)
        windows[tuple(window.flip(2).flatten().tolist())] = (y, top, left, True)
    found = []
    for images, labels in example.batches(x, torch.arange(3), o, seed=0):
        for image, label in zip(images, labels.tolist(), strict=True):
            found.append(windows[tuple(image.flatten().tolist())])
            assert found[-1][0] == label
    assert len(found) == 8 * example.BATCH
    assert set(found) == set(windows.values())  # 150 of them, in 1024 draws
    assert sum(mirrored for *_, mirrored in found) == pytest.approx(512, abs=80)  # 5 sigma
    plain = next(example.batches(x, torch.arange(3), example.Options(), seed=0))[0]
    assert all(any(torch.equal(image, own) for own in x) for image in plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arm": "weight decay"}, "arm='weight decay': use one of decay, no decay"),
        ({"steps": 0}, "steps='0'"),
        ({"lr": 0.0, "weight_decay": None}, "lr='0.0': must be a positive number"),
        ({"lr": 1e39}, r"lr='1e\+39': must be a positive number"),
        ({"shift": -1}, "shift='-1'"),
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
        example.run(**{**TOY, "lr": 1e37, "weight_decay": 1e-37}, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]


def test_the_script_prints_a_table_and_leaves_pages_and_a_picture(tmp_path):
    toy = ["--steps", "12", "--width", "1", "--train-images", "32"]
    command = [sys.executable, SCRIPT, *toy, "--out", tmp_path / "out"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "norm schedule" in found.stdout
    assert "<svg" in (tmp_path / "out" / "norm_matters.svg").read_text()
    for arm in ("decay", "no_decay", "lr_correction", "norm_schedule", "free", "fixed"):
        left = sorted(p.name for p in (tmp_path / "out" / arm).iterdir())
        assert left == ["report.html", "results.json", "run.jsonl"]


def test_a_wrong_option_is_one_line_and_exit_code_2(example, tmp_path, capsys):
    (tmp_path / "empty.npz").write_bytes(b"")
    assert example.main(["--data", str(tmp_path / "empty.npz")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("norm_matters_weight_decay.py: error: --data")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import norm_matters

    return norm_matters


def test_intervals_are_students(study):
    # Mean 2, standard deviation 1, n = 3: 4.303 / sqrt(3).
    assert study.interval([1.0, 2.0, 3.0], 1.0) == "2.00 ± 2.48"
    assert study.interval([0.5]) == "50.00"


def test_a_study_goes_on_where_it_was_stopped(study, tmp_path, monkeypatch):
    knobs, asked = {"steps": 12, "width": 1}, []

    def run(*, arm, seed, norms, progress, **knobs):
        asked.append((arm, seed, norms))
        if len(asked) == 4:
            raise KeyboardInterrupt
        about = vars(study.example.Options(**knobs)) | {"arm": arm, "seed": seed}
        return about | {"norms": f"norms of {arm}", "valid_accuracy": 0.1, "weight_decay": 4.0 / 3}

    monkeypatch.setattr(study.example, "run", run)
    monkeypatch.setattr(study.example.Options, "decay", 4.0 / 3)
    path = tmp_path / "runs.json"
    with pytest.raises(KeyboardInterrupt):
        study.measure([], 2, path, knobs)
    runs = study.former(path, knobs)
    assert [r["arm"] for r in runs] == ["decay", "no decay", "lr correction"]
    assert "norms" not in runs[0]
    study.measure(runs, 2, path, knobs)
    kept = [(r["arm"], r["seed"]) for r in study.former(path, knobs)]
    assert kept == [(arm, seed) for seed in (0, 1) for arm in study.example.ARMS]
    wanted = [None, *["norms of decay"] * 3, *[None] * 4, *["norms of decay"] * 5]
    assert [norms for *_, norms in asked] == wanted
    with pytest.raises(SystemExit, match="other knobs"):
        study.former(path, {"steps": 13})


def test_the_page_says_what_was_measured(study):
    results, page = json.loads(RESULTS.read_text()), PAGE.read_text()
    table = page.split("<!-- table -->\n\n")[1].split("\n\n<!-- end of table -->")[0]
    lines = [study.line(results["runs"], arm) for arm in study.example.ARMS]
    assert table.splitlines() == [*study.HEAD.splitlines(), *lines]


def test_the_shape_that_the_page_claims_is_there():
    runs = {(r["arm"], r["seed"]): r for r in json.loads(RESULTS.read_text())["runs"]}
    arms = {arm for arm, _ in runs}

    def apart(arm, key):
        return np.array([runs[arm, s][key] - runs["decay", s][key] for s in range(3)]) * 100

    assert apart("no decay", "before_drop") == pytest.approx([6.4] * 3, abs=0.45)
    assert apart("no decay", "valid_accuracy") == pytest.approx([-2.55] * 3, abs=0.75)
    for arm in arms - {"decay", "no decay"}:
        assert abs(apart(arm, "before_drop").mean()) < 1.2
        ends = apart(arm, "valid_accuracy")
        assert abs(ends.mean()) < 0.5
        assert abs(ends.mean()) < 4.303 * ends.std(ddof=1) / 3**0.5


def test_at_the_small_setting_the_end_is_as_the_page_says(study):
    found = json.loads((RESULTS.parent / "norm_matters_fashion_mnist.json").read_text())["runs"]
    assert "| −0.15 ± 1.28 |" in study.line(found, "no decay")
    means = {
        arm: {
            key: np.mean([100 * r[key] for r in found if r["arm"] == arm])
            for key in ("before_drop", "valid_accuracy")
        }
        for arm in study.example.ARMS
    }
    behind = means["no decay"]["before_drop"] - means["decay"]["before_drop"]
    assert behind == pytest.approx(8, abs=0.1)
    ends = [mean["valid_accuracy"] for mean in means.values()]
    assert max(ends) - min(ends) < 0.5
