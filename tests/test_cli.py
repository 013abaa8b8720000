"""The command line: exit codes, one-line errors, and what lands where."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from sphereopt.cli import main
from sphereopt.monitor import read_jsonl
from sphereopt.report import comparison
from sphereopt.train import loop

FILES = {"sgd.jsonl", "free.jsonl", "fixed.jsonl", "results.json", "report.html"}


def refused(argv, capsys):
    """Run a command line that must be refused; return its one line."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def test_train_end_to_end(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "results.json").write_text("old")
    assert main(["train", "--steps", "20", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no bar where there is no terminal
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"notes.txt"}
    assert out.splitlines()[-1].endswith(str(tmp_path / "report.html"))
    for text in ("(a) sgd", "(b) free", "virtual", 'SphereSGD(radius="fixed", move="rotate")'):
        assert text in out

    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["arms"]) == ["sgd", "free", "fixed"]
    assert results["config"]["steps"] == 20
    assert {"config", "recipe", "data", "spheres", "versions", "seconds"} <= set(results)
    free = results["arms"]["free"]
    assert len(free["loss"]) == 20
    # 20 steps in float64 with a norm eps of 1e-12: see test_train.py.
    assert free["loss_gap"] < 1e-10
    assert f"{free['angle']:.5f}" in out


def test_json_is_all_there_is_on_stdout(tmp_path, capsys):
    options = ["--steps", "3", "--seed", "5", "--lr", "0.05", "--dtype", "float32", "--json"]
    assert main(["train", *options, "--out", str(tmp_path / "new" / "folder")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    results = json.loads(out)
    config = results["config"]
    assert (config["seed"], config["lr"], config["dtype"]) == (5, 0.05, "float32")
    assert results == json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert (tmp_path / "new" / "folder" / "report.html").exists()


def test_own_data(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = rng.normal(size=(40, 5, 5)) + labels[:, None, None]
    path = tmp_path / "two <b> classes.npz"
    np.savez(
        path,
        train_images=images[:30],
        train_labels=labels[:30],
        test_images=images[30:],
        test_labels=labels[30:],
    )
    out = tmp_path / "out"
    options = ["--steps", "2", "--batch-size", "10", "--norm-eps", "1e-5", "--threads", "1"]
    assert main(["train", "--data", str(path), *options, "--out", str(out)]) == 0
    assert "two <b> classes.npz, 2 steps" in capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "two &lt;b&gt; classes.npz" in page
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--steps", "0"], ("--steps '0'", "1 or more")),
        (["--steps", "many"], ("--steps", "'many'", "whole number")),
        (["--steps", "2.5"], ("--steps", "'2.5'", "whole number")),
        (["--steps"], ("--steps", "expected one argument")),
        (["--seed", "-1"], ("--seed '-1'", "0 or more")),
        (["--batch-size", "1"], ("--batch-size '1'", "2 or more")),
        (["--batch-size", "5000"], ("--batch-size '5000'", "1438 training images")),
        (["--lr", "fast"], ("--lr", "'fast'", "not a number")),
        (["--lr", "0"], ("--lr '0.0'", "positive")),
        (["--lr", "nan"], ("--lr 'nan'", "positive")),
        (["--weight-decay", "0"], ("--weight-decay '0.0'", "positive")),
        (["--weight-decay", "5"], ("--weight-decay '5.0'", "use less")),
        (["--norm-eps", "0"], ("--norm-eps '0.0'", "positive")),
        (["--threads", "0"], ("--threads '0'", "1 or more")),
        (["--dtype", "float16"], ("--dtype 'float16'", "float32 or float64")),
        (["--data", "no/such/place"], ("--data 'no/such/place'", "no such folder", "digits")),
        (["--data", ""], ("--data ''", "digits")),
        (["--step", "3"], ("unknown arguments --step 3", "--help")),
        (["extra"], ("unknown arguments extra", "--help")),
    ],
)
def test_bad_options_are_one_line(options, expected, capsys, tmp_path):
    line = refused(["train", "--out", str(tmp_path / "out"), *options], capsys)
    assert line.startswith("sphereopt train: error: ")
    for text in expected:
        assert text in line
    assert not (tmp_path / "out").exists()  # refused before anything is made


def test_bad_folders_are_one_line(capsys, tmp_path):
    line = refused(["train", "--data", str(tmp_path)], capsys)
    assert f"--data {str(tmp_path)!r}" in line
    assert "train-images-idx3-ubyte" in line
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        line = refused(["train", "--out", str(path)], capsys)
        assert f"--out {str(path)!r}" in line
        assert "choose another folder" in line
    line = refused(["train", "--data", str(file)], capsys)
    assert "neither a folder nor an .npz" in line
    assert file.read_text() == "mine"


def test_data_error_over_several_lines_is_one_line(capsys, tmp_path):
    path = tmp_path / "a\nb.npz"
    path.write_text("hello")
    refused(["train", "--data", str(path)], capsys)


@pytest.mark.parametrize("module", ["matplotlib", "jinja2", "rich", "sklearn"])
def test_missing_extra_is_one_line(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    line = refused(["train"], capsys)
    assert 'pip install "sphereopt[examples,report]"' in line
    assert {"sklearn": "scikit-learn"}.get(module, module) in line


def test_interrupt_keeps_the_rows(monkeypatch, capsys, tmp_path):
    step, calls = loop._step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(loop, "_step", interrupted)
    assert main(["train", "--steps", "9", "--out", str(tmp_path)]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "interrupted" in err
    rows = read_jsonl(tmp_path / "sgd.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_divergence_is_one_line_and_exit_code_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(loop, "_step", lambda *args: float("nan"))
    assert main(["train", "--steps", "3", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("sphereopt train: error: the loss of arm (a) is nan at step 1")


def test_narrow_terminal(monkeypatch, capsys, tmp_path):
    # Saves a second.
    monkeypatch.setattr(comparison, "write", lambda folder: folder / "report.html")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for key, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(key, value)
    assert main(["train", "--steps", "2", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "(a) sgd" in err
    assert "2/2" in err
    lines = out.splitlines()
    assert any("0.574 → 0.574 stored" in line for line in lines)  # not folded
    assert lines[-4:-1] == [  # the long names, beneath
        "(a) torch.optim.SGD",
        '(b) SphereSGD(radius="free")',
        '(c) SphereSGD(radius="fixed", move="rotate")',
    ]


def test_commands(capsys):
    assert "COMMAND" in refused([], capsys)
    assert "'fly'" in refused(["fly"], capsys)
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--data", "--steps", "--seed", "--out", "--json", "--dtype"):
        assert option in text
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "train" in text
    assert "audit" in text  # its own tests are in test_audit.py


def test_module_runs_and_imports_nothing_optional():
    code = (
        "import runpy, sys, sphereopt.cli, sphereopt.train, sphereopt.report\n"
        "sys.argv = ['sphereopt', 'train', '--steps', '0']\n"
        "try:\n"
        "    runpy.run_module('sphereopt', run_name='__main__')\n"
        "finally:\n"
        "    wanted = {'matplotlib', 'sklearn', 'rich', 'jinja2', 'markupsafe'}\n"
        "    print(sorted(wanted & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr.startswith("sphereopt train: error: --steps '0'")
    assert done.returncode == 2
