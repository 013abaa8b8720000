"""examples/train_image.py: every knob at toy size, resuming, processes, and its errors."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import sphereopt as so
from sphereopt.train import DivergedError, OptionError, load

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples/train_image.py"
TOY = {"width": 0.5, "steps": 6, "batch_size": 16, "images": 64, "progress": False}
FILES = ["checkpoint.pt", "report.html", "results.json", "run.jsonl", "run.svg"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train_image

    return train_image


def subprocess_run(*arguments, launcher=()):
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_run_leaves_a_log_a_checkpoint_a_picture_and_a_report(example, tmp_path):
    results = example.run(**TOY, lr=0.1, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert json.loads((tmp_path / "results.json").read_text()) == results
    rows = so.monitor.read_jsonl(tmp_path / "run.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert [row["metrics"]["loss"] for row in rows] == results["losses"]
    assert len(rows[0]["parameters"]) == 21  # 19 convolutions and two of shortcuts
    assert results["train_loss"] == results["losses"][-1]
    assert (results["lr"], results["steps"]) == (0.1, 6)
    assert "<svg" in (tmp_path / "run.svg").read_text()


def test_a_new_run_replaces_the_files_of_the_old_one(example, tmp_path):
    for _ in range(2):
        example.run(**TOY, out=tmp_path)
    assert len(so.monitor.read_jsonl(tmp_path / "run.jsonl")) == 6


def test_it_learns_the_digits(example):
    results = example.run(optimizer="SphereSGD", lr=0.1, width=0.5, steps=80, progress=False)
    assert results["valid_accuracy"] > 0.9  # 0.98 here; chance is 0.1
    assert results["train_loss"] < results["losses"][0] / 5


@pytest.mark.parametrize(
    "knobs",
    [
        *({"optimizer": name} for name in ("SGD", "Adam", "AdamW")),
        *({"optimizer": f"Sphere{name}"} for name in ("SGD", "Adam", "Lion", "Muon")),
        *({"optimizer": f"Sphere{x}", "radius": "free"} for x in ("SGD", "Adam", "Lion", "Muon")),
        *({"net": "vgg11", "width": 0.125, "norm": norm} for norm in ("batch", "group", "layer")),
        *({"norm": norm} for norm in ("group", "layer")),
        {"amp": "bf16"},
        {"augment": True},
        {"warmup": 0, "ordinary_lr": 1e-3, "weight_decay": 0.0},
    ],
    ids=lambda knobs: "-".join(map(str, knobs.values())),
)
def test_every_optimizer_net_and_norm_trains(example, knobs):
    results = example.run(**{**TOY, "steps": 2, **knobs})
    assert all(np.isfinite(results["losses"]))
    assert 0 <= results["valid_accuracy"] <= 1
    assert results["optimizer"] == knobs.get("optimizer", "SphereSGD")


@pytest.mark.parametrize("net", ["resnet20", "vgg11"])
@pytest.mark.parametrize(("norm", "spec"), [("batch", "row"), ("group", "block"), ("layer", "ten")])
def test_every_convolution_is_on_a_sphere(example, net, norm, spec):
    o = example.Options(net=net, norm=norm, width=0.25)
    model = example.NETS[net](o, torch.Size((3, 32, 32)), 10)
    report = so.find_spheres(model, torch.randn(8, 3, 32, 32))
    convolutions = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == {"resnet20": 21, "vgg11": 8}[net]
    for name in convolutions:
        assert report[f"{name}.weight"].status == "proved", name
        # With 8 channels in all, one block of 8 filters is the whole.
        alone = model.get_submodule(name).weight.shape[0] == 8 and norm == "group"
        assert report[f"{name}.weight"].sphere.startswith("tensor" if alone else spec), name


@pytest.mark.parametrize(
    ("plain", "ours", "lr"), [("SGD", "SphereSGD", 0.02), ("AdamW", "SphereAdam", 1e-3)]
)
def test_free_radii_follow_torch_step_by_step(example, plain, ours, lr):
    knobs = {**TOY, "steps": 60, "dtype": "float64", "norm_eps": 0.0, "lr": lr, "norm": "group"}
    theirs = example.run(optimizer=plain, **knobs)
    free = example.run(optimizer=ours, radius="free", **knobs)
    fixed = example.run(optimizer=ours, **knobs)
    gap = np.abs(np.subtract(free["losses"], theirs["losses"]))
    # 2e-15 here; rounding grows, as training is chaotic.
    assert gap.max() < 1e-12
    assert np.abs(np.subtract(fixed["losses"], theirs["losses"])).max() > 1e-3
    assert free["valid_loss"] == pytest.approx(theirs["valid_loss"], abs=1e-12)


def stop_after(example, monkeypatch, steps):
    """Make the process end in the middle of the step after so many."""
    made = example.Run.step

    def step(self, tracker):
        if self.done == steps:
            raise KeyboardInterrupt
        made(self, tracker)

    monkeypatch.setattr(example.Run, "step", step)


@pytest.mark.parametrize("optimizer", ["SphereSGD", "AdamW"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    example, optimizer, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    knobs = {**TOY, "optimizer": optimizer, "augment": True, "save_every": 3}  # epochs of 4 steps
    expected = example.run(**knobs, out=whole)
    with monkeypatch.context() as patch:
        stop_after(example, patch, 5)
        with pytest.raises(KeyboardInterrupt):
            example.run(**knobs, out=parts)
    results = example.run(**knobs, out=parts, resume=True)
    assert results["losses"] == expected["losses"]
    assert results["valid_loss"] == expected["valid_loss"]
    states = [torch.load(folder / "checkpoint.pt")["model"] for folder in (whole, parts)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    logs = [so.monitor.read_jsonl(folder / "run.jsonl") for folder in (whole, parts)]
    assert logs[0] == logs[1]


def test_resuming_with_other_knobs_is_refused(example, tmp_path):
    example.run(**TOY, out=tmp_path)
    before = (tmp_path / "run.jsonl").read_bytes()
    with pytest.raises(OptionError, match=r"lr.*made with None"):
        example.run(**TOY, out=tmp_path, resume=True, lr=0.1)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(OptionError, match="cannot be read"):
        example.run(**TOY, out=tmp_path, resume=True)
    assert (tmp_path / "run.jsonl").read_bytes() == before


def test_a_run_that_diverges_stops_and_says_where(example, tmp_path, capsys):
    knobs = {**TOY, "optimizer": "SGD", "lr": 1e30, "out": tmp_path, "steps": 30}
    with pytest.raises(DivergedError, match=r"at step \d+, not finite.*smaller lr than 1e\+30"):
        example.run(**knobs)
    assert so.monitor.read_jsonl(tmp_path / "run.jsonl")
    assert not (tmp_path / "results.json").exists()
    options = [f"--{k.replace('_', '-')}={v}" for k, v in knobs.items() if k != "progress"]
    assert example.main(options) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_compiled_networks_train_as_they_are(example, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled(net, backend="eager"))
    knobs = {**TOY, "steps": 3, "net": "vgg11", "width": 0.125}
    assert example.run(**knobs, compile=True)["losses"] == example.run(**knobs)["losses"]


def test_two_processes_make_the_steps_of_one(example, tmp_path):
    knobs = {**TOY, "norm": "group", "lr": 0.05, "dtype": "float64", "steps": 10}
    one = example.run(**knobs, augment=True)
    options = [f"--{k.replace('_', '-')}={v}" for k, v in knobs.items() if k != "progress"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess_run(*options, "--augment", "--out", tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("valid_loss") == 1  # only the first process prints
    two = json.loads((tmp_path / "results.json").read_text())
    # Sums in another order: 1e-16 per step, and 10 steps to grow.
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-10)
    assert two["valid_loss"] == pytest.approx(one["valid_loss"], rel=1e-10)
    assert len(so.monitor.read_jsonl(tmp_path / "run.jsonl")) == 10


def test_images_are_shifted_and_mirrored_one_by_one(example):
    images = torch.arange(1.0, 1 + 16 * 2 * 6 * 7).reshape(16, 2, 6, 7)
    moved = example.shifted_and_mirrored(images, torch.Generator().manual_seed(0))
    seen = set()
    for before, after in zip(images, moved, strict=True):
        wide = torch.nn.functional.pad(before, [4] * 4)
        windows = {
            (i, j, flip): wide[:, i : i + 6, j : j + 7].flip(2) if flip else wide[:, i:, j:]
            for i in range(9)
            for j in range(9)
            for flip in (False, True)
        }
        match = [key for key, x in windows.items() if torch.equal(x[:, :6, :7], after)]
        assert len(match) == 1
        seen |= set(match)
    assert len(seen) > 3
    assert {flip for *_, flip in seen} == {False, True}


def test_every_epoch_sees_every_image_once_in_another_order(example):
    o = example.Options(images=64, batch_size=16, augment=False)
    images = example.Images(o, 0, 1)
    epochs = [torch.cat([images[step][0] for step in range(4 * e, 4 * e + 4)]) for e in range(2)]
    for epoch in epochs:
        assert torch.equal(epoch.flatten(1).unique(dim=0), images.x.flatten(1).unique(dim=0))
    assert not torch.equal(*epochs)
    again = example.Images(o, 0, 1)[5][0]
    assert torch.equal(again, epochs[1][16:32])


@pytest.fixture
def colours(tmp_path):
    """Return two files of the same colour images, channels first and last."""
    draw, names = np.random.default_rng(0), ("first", "last")
    x, y = draw.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8), np.arange(40) % 4
    for name in names:
        images = x if name == "first" else x.transpose(0, 2, 3, 1)
        arrays = {"train_images": images[:32], "test_images": images[32:]}
        labels = {"train_labels": y[:32], "test_labels": y[32:]}
        np.savez(tmp_path / f"{name}.npz", **arrays, **labels)
    return [str(tmp_path / f"{name}.npz") for name in names]


def test_colour_images_may_have_their_channels_last(example, colours):
    knobs = {**TOY, "steps": 2}
    first, last = (example.run(data=path, **knobs) for path in colours)
    assert first["losses"] == last["losses"]
    assert first["valid_loss"] == last["valid_loss"]


def test_images_of_28_pixels_are_augmented_and_digits_are_not(example, colours):
    assert example.Images(example.Options(data=colours[0], batch_size=8), 0, 1).augment
    assert not example.Images(example.Options(), 0, 1).augment


def test_the_rate_rises_and_then_falls_to_zero(example):
    job = type("Job", (), {"o": example.Options(steps=100, warmup=10)})
    rates = [example.Run.lr_factor(job, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0, abs=1e-15)


def test_weight_decay_goes_where_norms_are_free(example):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, bias=False), torch.nn.BatchNorm2d(8))
    model.append(torch.nn.Flatten()).append(torch.nn.Linear(8, 2))
    for optimizer, radius, decay, lr in (
        ("SGD", None, 0.3, 1e-3),
        ("SphereSGD", "free", 0.3, 1e-3),
        ("SphereSGD", None, 0.0, 0.02),
    ):
        o = example.Options(optimizer=optimizer, radius=radius, weight_decay=0.3, ordinary_lr=0.7)
        groups = example.make_optimizer(o, model, torch.randn(4, 1, 3, 3)).param_groups
        decays = {tuple(g["param_names"]): (g["weight_decay"], g["lr"]) for g in groups}
        assert decays[("0.weight",)] == (decay, lr)
        assert decays[("3.weight",)] == (0.3, 0.7)
        assert decays[("1.weight", "1.bias", "3.bias")] == (0.0, 0.7)


@pytest.mark.parametrize(
    ("knob", "value", "remedy"),
    [
        ("optimizer", "sgd", "SphereMuon"),
        ("net", "resnet", "vgg11"),
        ("norm", "instance", "batch, group"),
        ("radius", "fix", "fixed, free"),
        ("dtype", "bf16", "float64"),
        ("amp", "fp8", "bf16"),
        ("amp", "fp16", "needs cuda"),
        ("device", "gpu", "use cpu"),
        ("steps", 0, "positive"),
        ("lr", -1.0, "positive"),
        ("lr", float("nan"), "positive"),
        ("weight_decay", -1.0, "or zero"),
        ("batch_size", 65, "at most 64"),
        ("resume", True, "no checkpoint"),
        ("data", "nowhere", "no such folder"),
    ],
)
def test_a_bad_knob_is_named_and_nothing_is_written(example, knob, value, remedy, tmp_path):
    with pytest.raises(OptionError, match=remedy) as caught:
        example.run(**{**TOY, knob: value, "out": tmp_path / "out"})
    assert caught.value.option == knob
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(example):
    with pytest.raises(OptionError, match="no such device"):
        example.run(**TOY, device="cuda")


def test_torch_has_no_radius_to_choose(example):
    with pytest.raises(OptionError, match="no spheres"):
        example.run(**TOY, optimizer="SGD", radius="free")


def test_truncated_and_empty_files_are_named(example, tmp_path, capsys):
    whole = tmp_path / "whole.npz"
    digits = load("digits")
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(whole, **{name: getattr(digits, name).numpy() for name in parts})
    for name, content in (("cut.npz", whole.read_bytes()[:5000]), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        assert example.main(["--data", str(tmp_path / name), "--steps", "2"]) == 2
        error = capsys.readouterr().err
        assert "cannot be read" in error
        assert error.count("\n") == 1


def test_the_script_runs_and_names_errors_in_one_line(tmp_path):
    done = subprocess_run("--steps=2", "--width=0.5", "--images=64", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "valid_accuracy" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    done = subprocess_run("--optimizer=Sgd", "--out", tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr.startswith("train_image.py: error: optimizer='Sgd': use SGD, ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("wrong", ["--stepz=3", "--steps=three", "--steps=1.5", "--step=3"])
def test_options_that_cannot_be_read_are_named_in_one_line(example, wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        example.main([wrong])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("train_image.py: error: ")
    assert wrong.partition("=")[0] in error
    assert error.count("\n") == 1


def test_help_has_every_knob(example, capsys):
    with pytest.raises(SystemExit) as caught:
        example.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in vars(example.Options()))


def test_the_page_shows_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import drop_in

    results = json.loads((ROOT / "docs/results/train_image.json").read_text())
    page = (ROOT / "docs/examples/train_image.md").read_text()
    assert "\n".join(drop_in.lines(results["rows"])) in page
    assert f"torch {results['about']['torch']}, {results['about']['date']}" in page
    assert f"{results['about']['steps']} steps" in page
