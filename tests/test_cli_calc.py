"""``sphereopt calc``: its answers are those of the library, and what it refuses is one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sphereopt.cli import main
from sphereopt.theory import (
    OPTIMIZERS,
    SPHERE_OPTIMIZERS,
    equilibrium,
    for_batch_size,
    for_steps,
    schedule,
    trajectory,
    translate,
)

ADAMW = ["adamw", "--lr", "3e-4", "--weight-decay", "0.1", "--betas", "0.9", "0.95"]
RUN = ["--steps", "3000", "--warmup", "100", "--schedule", "cosine", "--final", "0.1"]
START = ["--init-std", "0.02"]
PAGE = Path(__file__).parent.parent / "docs" / "calc.md"
GIVEN = {"lr": 3e-4, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def said(argv, capsys):
    """Run a command that must succeed silently; return what it printed."""
    assert main(["calc", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def asked(argv, capsys):
    """Return the answer as JSON, refusing what JSON has not."""

    def constant(name):
        raise AssertionError(name)

    return json.loads(said([*argv, "--json"], capsys), parse_constant=constant)


def test_equilibrium_is_that_of_the_library(capsys):
    found = asked(ADAMW, capsys)["equilibrium"]
    expected = equilibrium("adamw", **GIVEN)
    for name in ("kappa", "memory", "K", "angle", "diffusive_angle", "rms", "relaxation"):
        assert found[name] == getattr(expected, name)
    assert found["norm"] is None
    assert found["settling"] is None
    text = said(ADAMW, capsys)
    assert f"{expected.angle:.4g}" in text
    assert "Step by step" not in text


def test_run_is_that_of_the_library(capsys):
    found = asked([*ADAMW, *RUN, *START], capsys)
    rate = schedule("cosine", 3e-4, 3000, warmup=100, final=0.1)
    given = {"rms0": 0.02, "betas": (0.9, 0.95)}
    run = trajectory("adamw", lr=rate, weight_decay=0.1, **given)
    points = found["run"]["points"]
    at = points["step"]
    assert (at[0], at[-1], len(at)) == (0, 2999, 200)
    assert points["rms"] == run.rms[at].tolist()
    assert points["angle"] == run.angle[at].tolist()
    assert points["lr"] == rate[at].tolist()
    assert points["norm"] is None
    assert found["memories"] == run.memories
    assert found["schedule"] == {"kind": "cosine", "steps": 3000, "warmup": 100, "final": 0.1}
    more = trajectory("adamw", lr=rate, weight_decay=0.2, **given)
    assert points["angle_double_weight_decay"] == more.angle[at].tolist()
    faster = trajectory("adamw", lr=2 * rate, weight_decay=0.1, **given)
    assert points["angle_double_lr"] == faster.angle[at].tolist()
    # Quasi-static: the equilibrium of that step's rate, to leading order in lr*weight_decay.
    for step, lr, angle in list(zip(at, points["lr"], points["quasi_static"], strict=True))[::50]:
        settled = equilibrium("adamw", lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
        assert angle == pytest.approx(settled.angle, rel=1e-3), step
    assert found["run"]["grad_rise"] == pytest.approx(run.rms.max() / run.rms[-1])


def test_quasi_static_angles_have_the_power_of_the_optimizer(capsys):
    options = ["--dim", "100", "--grad-norm", "1", "--init-norm", "1"]
    for name in ("sgd", "sgdw", "adam", "adamw", "sign", "lion"):
        argv = [name, "--lr", "1e-3", "--weight-decay", "1e-3", *options, "--steps", "50"]
        points = asked([*argv, "--schedule", "linear"], capsys)["run"]["points"]
        known = {"dim": 100, "grad_norm": 1.0}
        settled = equilibrium(name, lr=points["lr"][25], weight_decay=1e-3, **known)
        # Adam's rate at little angle varies with eps: 1 % of it.
        assert points["quasi_static"][25] == pytest.approx(settled.angle, rel=0.01), name


@pytest.mark.parametrize("start", [0.5, 1.0, 3.0])
def test_a_long_run_at_constant_rate_reaches_equilibrium_when_it_says(start, capsys):
    settings = {"lr": 0.1, "weight_decay": 5e-3, "grad_norm": 1.0}
    norm = equilibrium("sgd", **settings).norm
    argv = ["sgd", "--lr", "0.1", "--weight-decay", "5e-3", "--grad-norm", "1", "--steps", "8000"]
    argv += ["--init-norm", str(start * norm)]
    found = asked(argv, capsys)
    first, last = found["run"]["reached"]
    assert last == 7999
    assert first == found["equilibrium"]["settling"]
    run = trajectory("sgd", norm0=start * norm, steps=8000, **settings)
    assert abs(run.norm[first:] / norm - 1).max() <= 0.05
    assert first == 0 or abs(run.norm[first - 1] / norm - 1) > 0.05
    assert f"yes, from step {first} to the end" in said(argv, capsys)


def test_a_run_that_only_crosses_its_equilibrium_does_not_reach_it(capsys):
    faster = ["adamw", "--lr", "3e-3", "--weight-decay", "0.1", "--betas", "0.9", "0.95"]
    argv = [*faster, "--steps", "10000", "--schedule", "cosine", "--final", "0.1"]
    argv += ["--init-std", "0.06"]
    found = asked(argv, capsys)["run"]
    assert found["reached"] is None
    points = found["points"]
    near = np.abs(np.array(points["rms"]) / np.array(points["equilibrium"]) - 1) < 0.05
    assert near.any()  # it crosses
    text = said(argv, capsys)
    assert "equilibrium    no: the norm does not stay near" in text
    # A run that starts at equilibrium and leaves it was there.
    argv = [*faster, "--steps", "20000", "--schedule", "wsd", "--init-std", "0.121"]
    first, last = asked(argv, capsys)["run"]["reached"]
    assert first == 0
    assert 16_000 < last < 19_000
    assert f"to step {last}; then lr falls faster" in said(argv, capsys)


def test_settling_counts_the_lag_of_the_second_moment_and_is_closed_form_in_long_runs(capsys):
    argv = ["adamw", "--lr", "3e-4", "--weight-decay", "0.1", *START]
    run = trajectory("adamw", lr=3e-4, weight_decay=0.1, rms0=0.02, steps=60_000)
    settled = 60_000 - int(np.argmax(~run.settled[::-1]))
    assert asked(argv, capsys)["equilibrium"]["settling"] == settled
    slow = ["adamw", "--lr", "3e-6", "--weight-decay", "0.1", "--init-std", "0.002"]
    found = asked(slow, capsys)["equilibrium"]
    # 3.3 million steps: |w|^2 relaxes at twice the rate of forgetting.
    share = (1 - (0.002 / found["rms"]) ** 2) / (1 - 0.95**2)
    assert found["settling"] == pytest.approx(np.log(share) / (2 * found["kappa"]))


def test_doubling_is_measured_at_equilibrium(capsys):
    found = asked(["sgd", "--lr", "0.1", "--weight-decay", "1e-4"], capsys)["doubled"]
    # |w|^4 is proportional to lr over decay, the squared angle to their product.
    assert found["weight_decay"] == pytest.approx(
        {"angle": 2**0.5, "norm": 2**-0.25, "memory": 0.5}, rel=1e-4
    )
    assert found["lr"]["norm"] == pytest.approx(2**0.25, rel=1e-4)


@pytest.mark.parametrize("target", [*OPTIMIZERS, *SPHERE_OPTIMIZERS])
def test_conversions_are_those_of_the_library(target, capsys):
    known = {"dim": 64, "grad_norm": 1.0}
    argv = [*ADAMW, "--dim", "64", "--grad-norm", "1", "--convert", target]
    other = {"shape": (8, 8)} if target in ("muon", "sphere-muon") else None
    argv += ["--shape", "8", "8"] if other else []
    expected = translate("adamw", target, target_hyper=other, **known, **GIVEN)
    found = asked(argv, capsys)["convert"]
    assert (found["lr"], found["weight_decay"]) == (expected.lr, expected.weight_decay)
    assert found["call"] == str(expected)
    assert f"Converted to {target}\n  {expected}\n" in said(argv, capsys)


def test_batch_and_duration_are_those_of_the_library(capsys):
    found = asked([*ADAMW, "--batch-size", "4x", "--steps", "0.5x"], capsys)
    for key, expected in (
        ("batch_size", for_batch_size("adamw", 4, **GIVEN)),
        ("steps", for_steps("adamw", 0.5, **GIVEN)),
    ):
        assert [(x["lr"], x["weight_decay"], x["note"]) for x in found[key]] == [
            (x.lr, x.weight_decay, x.note) for x in expected
        ]
    assert found["schedule"] is None
    for steps in (["--steps", "500", "4x"], ["--steps", "4x", "--steps", "500"]):
        both = asked([*ADAMW, *steps, *START], capsys)
        assert both["schedule"] == {"kind": "constant", "steps": 500}
        assert len(both["steps"]) == 3


MORE = {
    "sgd": ["--momentum", "0.9", "--nesterov", "--grad-norm", "1", "--dim", "9"],
    "sgdw": ["--momentum", "0.9", "--dampening", "0.5", "--grad-norm", "1", "--dim", "9"],
    "adam": ["--dim", "9", "--grad-norm", "1", "--eps", "1e-6"],
    "adamw": ["--dtype", "bfloat16"],
    "sign": [],
    "signum": ["--momentum", "0.5"],
    "lion": ["--betas", "0.95", "0.98"],
    "muon": ["--shape", "4", "8", "--no-nesterov", "--adjust-lr-fn", "match_rms_adamw"],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_answered_in_full(name, capsys):
    argv = [name, "--lr", "1e-3", "--weight-decay", "0.05", *MORE[name], *START]
    argv += ["--steps", "300", "2x", "--batch-size", "2x", "--schedule", "step", "--gamma", "0.5"]
    found = asked([*argv, "--milestones", "0.5", "0.8"], capsys)
    assert found["missing"] == []
    assert found["run"]["points"]["angle"][-1] > 0
    assert found["schedule"]["milestones"] == [0.5, 0.8]
    assert found["sphere"]["optimizer"].startswith("sphere-")
    # Ours with the same momentum turns by the angle of equilibrium.
    assert found["sphere"]["lr"] == pytest.approx(found["equilibrium"]["angle"], rel=1e-2)
    text = said([*argv, "--milestones", "0.5", "0.8"], capsys)
    assert "Step by step" in text
    assert "lr step (gamma 0.5, milestones 0.5 0.8)" in text


KEYS = {
    "": "batch_size convert doubled equilibrium memories missing run schedule settings sphere "
    "steps warnings",
    "settings": "call hyper lr note optimizer weight_decay",
    "sphere": "call hyper lr note optimizer weight_decay",
    "convert": "call hyper lr note optimizer weight_decay",
    "equilibrium": "K angle diffusive_angle grad_ratio kappa memory norm relaxation rms settling",
    "doubled": "lr weight_decay",
    "run": "grad_rise points reached relaxations",
}
POINTS = "angle angle_double_lr angle_double_weight_decay equilibrium lr norm quasi_static rms step"


def test_json_keys_stay(capsys):
    full = asked([*ADAMW, *RUN, *START, "--convert", "lion", "--batch-size", "2x"], capsys)
    for name, keys in KEYS.items():
        assert sorted(full[name] if name else full) == keys.split(), name
    assert sorted(full["run"]["points"]) == POINTS.split()
    assert sorted(full["doubled"]["lr"]) == ["angle", "memory", "norm"]
    assert full["batch_size"][0].keys() == full["settings"].keys()
    bare = asked(ADAMW, capsys)
    assert sorted(bare) == sorted(full)
    assert bare["run"] is bare["convert"] is bare["schedule"] is None
    page = PAGE.read_text()
    for keys in (*KEYS.values(), POINTS):
        assert all(f"`{key}`" in page for key in keys.split())


def test_what_a_run_needs_is_said(capsys):
    text = said(["sgd", "--lr", "0.1", "--weight-decay", "1e-4", *RUN], capsys)
    assert "--init-std or --init-norm: the size of the weights" in text
    assert "--grad-norm: norm of the block's gradient" in text
    assert "memories of the direction" in text
    found = asked([*ADAMW, *RUN], capsys)
    assert found["run"] is None
    rate = schedule("cosine", 3e-4, 3000, warmup=100, final=0.1)
    # kappa = -log(1 - lr*decay) is taken as proportional to lr.
    assert found["memories"] == pytest.approx(0.1 * rate.sum(), rel=1e-3)
    assert found["missing"][0].startswith("--init-std or --init-norm")


def test_steps_without_a_rate_have_no_equilibrium(capsys):
    argv = ["sgd", "--lr", "0.1", "--weight-decay", "1e-3", "--grad-norm", "1", "--init-norm", "1"]
    argv += ["--steps", "90", "--schedule", "linear", "--final", "0", "--warmup", "1"]
    assert None not in asked(argv, capsys)["run"]["points"]["equilibrium"]
    # A warm-up does not start at zero, and a decay ends one step after the last.
    fallen = ["--schedule", "step", "--gamma", "1e-200", "--milestones", "0.3", "0.6"]
    found = asked([*argv[:-6], *fallen], capsys)["run"]["points"]
    assert found["equilibrium"][-1] is None
    assert found["lr"][-1] == found["angle"][-1] == 0
    assert " inf " in said([*argv[:-6], *fallen], capsys)


def test_warnings_are_printed(capsys):
    argv = [*ADAMW, "--dtype", "bfloat16"]
    assert "Warnings\n  bfloat16: multiplying weights" in said(argv, capsys)
    assert asked(argv, capsys)["warnings"][0].startswith("bfloat16")


def test_plots_are_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    for name in ("run.png", "run.svg"):
        said([*ADAMW, *RUN, *START, "--plot", str(tmp_path / name)], capsys)
    with image.open(tmp_path / "run.png") as picture:
        assert picture.size == (960, 720)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # not blank
    text = (tmp_path / "run.svg").read_text()
    for words in ("rms weight", "angle per step (rad)", "if settled", "adamw, lr 0.0003"):
        assert words in text
    dashed = [path for path in re.findall(r"<path [^>]*>", text) if "stroke-dasharray" in path]
    assert sum(len(path) > 1000 for path in dashed) == 2  # both panels have the other curve
    said(
        [*ADAMW, *RUN, "--dim", "64", "--init-norm", "1", "--plot", str(tmp_path / "n.svg")], capsys
    )
    assert ">norm<" in (tmp_path / "n.svg").read_text()


def test_terminals_get_tables_if_rich_is_installed(monkeypatch, capsys):
    pytest.importorskip("rich")
    plain = said([*ADAMW, *RUN, *START], capsys)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for key, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(key, value)
    drawn = said([*ADAMW, *RUN, *START], capsys)
    assert "───" in drawn
    for word in plain.split():
        assert word in drawn
    monkeypatch.setitem(sys.modules, "rich", None)
    assert said([*ADAMW, *RUN, *START], capsys) == plain


def test_nothing_optional_is_imported():
    code = (
        "import sys\nfrom sphereopt.cli import main\n"
        f"code = main({['calc', *ADAMW, *RUN, *START]!r})\n"
        "wanted = {'matplotlib', 'sklearn', 'rich', 'jinja2', 'PIL'}\n"
        "print(code, sorted(wanted & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["calc", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    page = PAGE.read_text()
    for option in ("lr", "weight-decay", "steps", "convert", "batch-size", "plot", "json", "dtype"):
        assert f"--{option}" in text
        assert f"--{option}" in page
    assert all(name in text for name in OPTIMIZERS)


def test_the_angle_that_is_printed_is_the_angle_of_the_real_optimizer(capsys):
    """From the command line to torch.optim.AdamW on noise, with nothing of ours in between."""
    argv = ["adamw", "--lr", "1e-2", "--weight-decay", "0.1", "--betas", "0.9", "0.95"]
    argv += ["--steps", "400", "--warmup", "50", "--schedule", "cosine", "--init-std", "0.1"]
    points = asked(argv, capsys)["run"]["points"]
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(0.1 * torch.randn(64, 256, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.AdamW([w], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    squares = []
    for lr in schedule("cosine", 1e-2, 400, warmup=50):
        old = w.detach().clone()
        unit = old / old.norm(dim=1, keepdim=True)
        noise = torch.randn(w.shape, generator=generator, dtype=w.dtype)
        w.grad = (noise - (noise * unit).sum(1, keepdim=True) * unit) / old.norm(
            dim=1, keepdim=True
        )
        optimizer.param_groups[0]["lr"] = float(lr)
        optimizer.step()
        cosine = torch.nn.functional.cosine_similarity(old, w.detach(), dim=1)
        squares.append(cosine.acos().square().mean().item())
    found = np.sqrt(np.array(squares))[points["step"]]
    assert np.array(points["angle"]) == pytest.approx(found, rel=0.03)
