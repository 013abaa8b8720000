"""The GPT example: it trains, resumes to the bit, copies AdamW, and says what is wrong."""

import gzip
import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import sphereopt as so

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "train_gpt.py"
SMALL = {"depth": 1, "width": 16, "heads": 2, "context": 12, "batch_size": 4, "warmup": 2}
SMALL |= {"valid_windows": 6, "every": 1, "lr": 0.01, "progress": False}


@pytest.fixture
def gpt(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train_gpt

    return train_gpt


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be, or not to be: that is the question; " * 60, encoding="utf-8")
    return str(path)


def train(gpt, text, **options):
    return gpt.run(**(SMALL | {"data": text, "steps": 8} | options))


@pytest.mark.parametrize(
    "name",
    [
        *["SGD", "SphereSGD", "AdamW", "SphereAdam", "SphereLion"],
        *["AdamH", "Muon", "SphereMuon", "MuonH"],
    ],
)
def test_every_optimizer_learns(gpt, text, name):
    options = {"steps": 50, "constrain": name not in ("AdamW", "SGD", "Muon"), "lr": 0.03}
    result = train(gpt, text, optimizer=name, **options)
    assert result["valid_loss"] < 0.9 * result["losses"][0]
    assert result["train_loss"] < 0.9 * result["losses"][0]
    assert 0 < result["valid_accuracy"] <= 1
    assert result["valid_bits"] == result["valid_loss"] / math.log(2)


def test_schedules_warm_up_and_come_down(gpt):
    cosine = gpt.Config(steps=110, warmup=10)
    shares = [gpt.share_of_peak(step, cosine) for step in range(111)]
    assert shares[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert [shares[n] for n in (10, 60, 110)] == pytest.approx([1.0, 0.55, 0.1])
    wsd = gpt.Config(steps=100, warmup=10, schedule="wsd")
    shares = [gpt.share_of_peak(step, wsd) for step in range(101)]
    assert shares[9:81] == pytest.approx([1.0] * 72)
    assert [shares[n] for n in (4, 90, 100)] == pytest.approx([0.5, 0.5, 0.0])


def test_the_schedule_moves_angles_and_plain_rates_alike(gpt, text):
    knobs = {k: v for k, v in SMALL.items() if k != "progress"}
    run = gpt.Run(gpt.Config(data=text, ordinary_lr=0.003, **knobs))
    for _ in range(3):
        run.make_step(None)
    rates = {(g["sphere"] is None): g["lr"] for g in run.optimizer.param_groups}
    share = gpt.share_of_peak(3, run.config)
    assert rates == {False: pytest.approx(0.01 * share), True: pytest.approx(0.003 * share)}


@pytest.mark.parametrize(
    ("name", "knobs", "held", "rest"),
    [
        ("AdamW", {}, 1e-3, 1e-3),  # torch's own
        ("AdamW", {"lr": 0.04}, 0.04, 0.04),
        ("SphereSGD", {}, 0.02, 0.1),  # ours
        ("SphereSGD", {"lr": 0.04}, 0.04, 0.04),
        ("SphereAdam", {}, 0.02, 3e-3),
        ("SphereAdam", {"lr": 0.04}, 0.04, 0.01),
        ("SphereAdam", {"lr": 0.04, "ordinary_lr": 0.5}, 0.04, 0.5),
        ("SphereAdam", {"ordinary_lr": 0.5}, 0.02, 0.5),
        ("SphereAdam", {"radius": "free"}, 1e-3, 1e-3),
        ("SphereAdam", {"radius": "free", "lr": 0.04}, 0.04, 0.04),
        ("SphereLion", {"lr": 0.04}, 0.04, 1e-3),
        ("MuonH", {}, 0.02, 0.02),  # Hyperball's
    ],
)
def test_rates_are_those_asked_for_or_the_optimizers_own(gpt, text, name, knobs, held, rest):
    small = {k: v for k, v in SMALL.items() if k not in ("progress", "lr")}
    run = gpt.Run(gpt.Config(data=text, optimizer=name, **small, **knobs))
    rates = {(g["sphere"] is None): g["initial_lr"] for g in run.optimizer.param_groups}
    assert rates == {False: held, True: rest}
    assert gpt.summary(run, 0.0)["lr"] == held
    decays = {g["weight_decay"] for g in run.optimizer.param_groups if g["sphere"] is not None}
    plain = name == "AdamW" or knobs.get("radius") == "free"
    assert decays == {0.1 if plain else 0.0}  # where a norm is fixed there is nothing to decay


def test_batches_depend_on_seed_and_step_and_nothing_else(gpt):
    tokens = torch.arange(10_000)
    first, other = (gpt.Config(seed=seed, context=8, batch_size=4) for seed in (0, 1))
    windows = gpt.batch(tokens, first, 5)
    assert torch.equal(windows, gpt.batch(tokens, first, 5))
    assert torch.equal(windows - windows[:, :1], torch.arange(9).expand(4, 9))
    for config, step in ((first, 6), (other, 5)):
        assert not torch.equal(windows, gpt.batch(tokens, config, step))


def test_heads_and_writers_are_proved_the_rest_is_held_by_choice(gpt, text):
    sizes = train(gpt, text, steps=1)["weights"]
    chosen = train(gpt, text, steps=1, constrain=True)["weights"]
    q, mlp = 16 * 16, 4 * 16 * 16
    vocabulary = len(set(Path(text).read_text()))
    assert sizes["proved"] == 2 * q + (16 * vocabulary + q + mlp)  # heads, and the joint writers
    assert sizes["constrained"] == 0
    assert chosen["proved"] == sizes["proved"]
    assert chosen["constrained"] == q + mlp  # v and up
    assert chosen["ordinary"] == 16 * vocabulary  # the head


def test_a_tied_head_leaves_the_heads_only_and_sandwich_norms_all_matrices(gpt, text):
    assert train(gpt, text, steps=1, tied=True)["weights"]["proved"] == 2 * 256
    sandwich = train(gpt, text, steps=1, sandwich_norm=True)["weights"]
    assert sandwich["proved"] == 4 * 256 + 2 * 1024
    assert train(gpt, text, steps=1, tied=True, qk_norm=False)["weights"]["proved"] == 0


def test_held_norms_stay_and_the_angle_is_the_lr(gpt, text, tmp_path):
    options = {"out": tmp_path / "run", "optimizer": "SphereMuon", "constrain": True}
    train(gpt, text, steps=20, **options)
    rows = so.monitor.read_jsonl(tmp_path / "run" / "run.jsonl")
    rows = [row for row in rows if "parameters" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["metrics"]["loss"] for row in rows[:2]]
    for row in rows:
        assert len(row["parameters"]) == 6
        for entry in row["parameters"].values():
            # float32 weights hold an angle of 0.001 radians to about a thousandth.
            assert entry["angle"]["mean"] == pytest.approx(entry["lr"], rel=2e-3)
    first, last = rows[0]["parameters"], rows[-1]["parameters"]
    for name, entry in first.items():
        assert last[name]["norm"]["mean"] == pytest.approx(entry["norm"]["mean"], rel=1e-5)


@pytest.mark.parametrize("pair", [("AdamW", "SphereAdam"), ("SGD", "SphereSGD")])
@pytest.mark.parametrize("sandwich", [False, True])
def test_free_radius_copies_the_plain_optimizer_in_float64(gpt, text, pair, sandwich):
    # Clipping looks at gradients, whose size goes with the stored norm: it has to be off.
    options = {"steps": 80, "clip": 0.0, "norm_eps": 1e-30, "weight_decay": 0.1}
    options["sandwich_norm"] = sandwich
    torch.set_default_dtype(torch.float64)
    try:
        plain = train(gpt, text, optimizer=pair[0], **options)
        free = train(gpt, text, optimizer=pair[1], radius="free", **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert free["weights"]["proved"] > 0
    # Rounding, 2e-16, grows a little over 80 steps.
    assert free["losses"] == pytest.approx(plain["losses"], rel=1e-12)
    assert free["valid_loss"] == pytest.approx(plain["valid_loss"], rel=1e-12)
    assert plain["losses"][-1] < 0.97 * plain["losses"][0]


def test_clipping_is_what_tells_a_free_radius_from_adamw(gpt, text):
    options = {"steps": 40, "norm_eps": 1e-30, "weight_decay": 0.1, "lr": 0.03, "clip": 0.1}
    torch.set_default_dtype(torch.float64)
    try:
        plain = train(gpt, text, optimizer="AdamW", **options)
        free = train(gpt, text, optimizer="SphereAdam", radius="free", **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert free["losses"] != pytest.approx(plain["losses"], rel=1e-9)


@pytest.mark.parametrize("name", ["AdamW", "SphereAdam", "SphereMuon", "Muon"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(gpt, text, tmp_path, monkeypatch, name):
    options = {"optimizer": name, "constrain": True, "checkpoint_every": 4, "steps": 10}
    whole = train(gpt, text, out=tmp_path / "whole", **options)
    make_step = gpt.Run.make_step

    def interrupted(run, log):
        if run.step == 6:
            raise KeyboardInterrupt
        make_step(run, log)

    monkeypatch.setattr(gpt.Run, "make_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(gpt, text, out=tmp_path / "cut", **options)
    monkeypatch.undo()
    torch.manual_seed(123)  # nothing may hang on the state of the generator
    resumed = train(gpt, text, out=tmp_path / "cut", resume=True, **options)
    assert resumed["losses"] == whole["losses"]
    assert resumed["valid_loss"] == whole["valid_loss"]
    a, b = (
        torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"]
        for n in ("whole", "cut")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    if name != "Muon":  # which has no spheres to log
        rows = so.monitor.read_jsonl(tmp_path / "cut" / "run.jsonl")
        assert rows[-1]["step"] == 10


def test_resuming_with_other_options_or_nothing_is_refused(gpt, text, tmp_path):
    with pytest.raises(gpt.RunError, match=r"there is no .*checkpoint.pt"):
        train(gpt, text, out=tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    train(gpt, text, out=tmp_path / "run")
    with pytest.raises(gpt.RunError, match="another lr, seed"):
        train(gpt, text, out=tmp_path / "run", resume=True, seed=1, lr=0.5)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_log(gpt, text, tmp_path):
    options = {"optimizer": "AdamW", "lr": 1e30, "steps": 60, "checkpoint_every": 1}
    with pytest.raises(gpt.RunError, match=r"not finite at step [1-9]"):
        train(gpt, text, out=tmp_path / "run", **options)
    rows = so.monitor.read_jsonl(tmp_path / "run" / "run.jsonl")
    assert 1 < len(rows) < 60
    assert not (tmp_path / "run" / "result.json").exists()


def test_batches_depend_on_seed_and_step_only(gpt, text):
    first, again = (train(gpt, text)["losses"] for _ in range(2))
    other = train(gpt, text, seed=1)["losses"]
    assert first == again
    assert first != other


def test_bytes_characters_and_gzip_are_read_alike(gpt, tmp_path):
    words = "δέλτα and epsilon; " * 80
    (tmp_path / "a.txt").write_text(words, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(words.encode()))
    plain = gpt.load_text(gpt.Config(data=str(tmp_path / "a.txt"), level="char", context=8))
    packed = gpt.load_text(gpt.Config(data=str(tmp_path / "b.txt.gz"), level="char", context=8))
    assert torch.equal(plain[0], packed[0])
    assert plain[2] == len(set(words))
    assert len(plain[0]) == len(words) * 9 // 10
    assert len(plain[0]) + len(plain[1]) == len(words)
    in_bytes = gpt.load_text(gpt.Config(data=str(tmp_path / "a.txt"), context=8))
    assert in_bytes[2] == len(set(words.encode()))


def test_a_folder_is_split_between_files(gpt, tmp_path):
    for name, letter, count in (("1", "a", 500), ("2", "b", 380), ("3", "c", 120)):
        (tmp_path / name).write_text(letter * count)
    train_part, valid, vocabulary = gpt.load_text(gpt.Config(data=str(tmp_path), context=8))
    assert (len(train_part), len(valid), vocabulary) == (880, 120, 3)
    assert set(valid.tolist()) == {2}


def test_the_standard_library_is_text_enough(gpt):
    train_part, valid, vocabulary = gpt.load_text(gpt.Config())
    assert len(train_part) == 2_000_000
    assert len(valid) > 100_000
    assert vocabulary <= 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere.txt"}, "--data 'nowhere.txt': there is no such file"),
        ({"optimizer": "Adamw"}, "--optimizer 'Adamw': choose from SGD, .*AdamW"),
        ({"steps": 0}, "--steps 0: must be between 1e-38 and 1e38"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"weight_decay": -0.5}, "--weight-decay -0.5: must be between 0 and 1e38"),
        ({"lr": 1e39}, r"--lr 1e\+39: must be between 0 and 1e38"),
        ({"width": 18}, "--width 18: choose a multiple of 4"),
        ({"radius": "free", "constrain": True}, "--radius free: needs"),
        ({"device": "cuda:99"}, "--device cuda:99: torch cannot use it"),
        ({"device": "nonsense"}, "--device nonsense: torch cannot use it"),
        ({"context": 5000}, "tokens are few for --context 5000"),
    ],
)
def test_what_cannot_be_used_is_named(gpt, text, tmp_path, options, message):
    with pytest.raises(gpt.RunError, match=message):
        train(gpt, text, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "level"),
    [
        ("empty.txt", b"", "byte"),
        ("cut.txt.gz", gzip.compress(os.urandom(2000))[:-100], "byte"),
        ("no.txt.gz", b"this is no gzip file" * 100, "byte"),
        ("latin.txt", "é".encode("latin-1") * 1000, "char"),
    ],
)
def test_files_that_are_no_text_are_named(gpt, tmp_path, name, content, level):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(gpt.RunError, match=name.replace(".", r"\.")):
        train(gpt, str(tmp_path / name), level=level)


def test_the_script_runs_and_errors_are_one_line(tmp_path, text):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(SCRIPT), "--data", text, "--out"]
    small = [
        f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "progress"
    ]

    def script(*options):
        line = [*command, *options]
        return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)

    made = script(str(tmp_path / "run"), *small, "--steps=5", "--constrain", "--amp")
    assert made.returncode == 0, made.stderr
    assert re.search(r"proved weights +│ [\d,]+ +│", made.stdout)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        *("run.jsonl", "checkpoint.pt", "report.html", "result.json", "loss.svg")
    }
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 5
    for wrong in ("--optimizer=Adagrad", "--steps=many", "--device=cuda:99"):
        failed = script(str(tmp_path / "no"), wrong)
        assert failed.returncode == 2
        assert failed.stderr.count("\n") == 1
        assert wrong.split("=")[0] in failed.stderr
    assert not (tmp_path / "no").exists()


def test_every_knob_says_what_it_is(gpt):
    assert all(entry.metadata["help"] for entry in fields(gpt.Config))


PAGE = (ROOT / "docs/examples/train_gpt.md").read_text()
MEASURED = json.loads((ROOT / "docs/results/train_gpt.json").read_text())


def test_the_page_shows_what_was_measured():
    for row in MEASURED["compared"]["rows"]:
        line = f"| {row['optimizer']} | {row['lr']:g} | {row['mean']:.3f} ± {row['interval']:.3f} "
        assert line + f"| {row['train']:.3f} |" in PAGE
    names = {"threads": "`AdamW` on two threads", "free": '`SphereAdam(radius="free")`'}
    for name, label in names.items():
        rows = [row[name] for row in MEASURED["drop_in"]["rows"]]
        figures = [f"{max(row[key] for row in rows):.1e}" for key in ("largest", "mean", "valid")]
        assert f"| {label} | {' | '.join(figures)} |" in PAGE
    clipped = MEASURED["drop_in"]["rows"][0]["clipped"]["largest"]
    assert f"| the same, both clipped | {clipped:.1e} |" in PAGE


def test_what_the_page_says_of_the_families_is_so():
    rows = {row["optimizer"]: row for row in MEASURED["compared"]["rows"]}
    families = ("AdamW", "SphereAdam", "AdamH"), ("Muon", "SphereMuon", "MuonH")
    plain, orthogonal = ([rows[name] for name in family] for family in families)
    assert max(row["mean"] for row in orthogonal) + 0.1 < min(row["mean"] for row in plain)
    for family in (plain, orthogonal):
        for a, b in itertools.combinations(family, 2):
            assert abs(a["mean"] - b["mean"]) < a["interval"] + b["interval"]
    assert {row["lr"] for name, row in rows.items() if name not in ("AdamW", "Muon")} == {0.03}
    assert [name for name, row in rows.items() if row["edge"]] == ["Muon"]
