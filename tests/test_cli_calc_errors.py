"""``sphereopt calc`` refuses what it cannot use in one line that names the option."""

import sys

import pytest

from sphereopt.cli import main

ADAMW = ["adamw", "--lr", "3e-4", "--weight-decay", "0.1", "--betas", "0.9", "0.95"]
START = ["--init-std", "0.02"]


def refused(argv, capsys):
    """Run a command that must be refused; return its one line."""
    with pytest.raises(SystemExit) as caught:
        main(["calc", *argv])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("sphereopt calc: error: ")
    return err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--lr", "0"], "--lr 0.0: must be positive"),
        (["--lr", "-1"], "--lr -1.0: must be positive"),
        (["--lr", "nan"], "--lr nan: must be positive"),
        (["--lr", "inf"], "--lr inf: must be positive"),
        (["--lr", "fast"], "--lr: 'fast' is not a number"),
        (["--lr", "11"], "--lr 11.0: times --weight-decay 0.1 must be below 1"),
        (["--lr", "6"], "--weight-decay 0.1: times lr=6.0 must be well below 0.5"),
        (["--weight-decay", "0"], "--weight-decay 0.0: must be positive"),
        (["--betas", "0.9", "1"], "--betas 1.0: must be 0 or more and below 1"),
        (["--betas", "0.9"], "--betas: expected 2 arguments"),
        (["--eps", "-1"], "--eps -1.0: must be 0 or more"),
        (["--momentum", "0.9"], "--momentum 0.9: is no option of adamw (it has: betas, eps)"),
        (["--nesterov"], "--nesterov True: is no option of adamw"),
        (["--shape", "3", "4"], "--shape 3 4: is no option of adamw"),
        (["--shape", "3", "x", "--convert", "muon"], "--shape: 'x' is not a whole number"),
        (["--convert", "muon"], "--shape: must be the (rows, columns)"),
        (["--convert", "lyon"], "--convert lyon: must be one of sgd"),
        (["--convert", "sgd"], "--dim: must be given"),
        (["--dtype", "int8"], "--dtype int8: must be one of float64"),
        (["--dim", "0"], "--dim 0: must be a whole number, 1 or more"),
        (["--dim", "2.5"], "--dim: '2.5' is not a whole number"),
        (["--grad-norm", "0"], "--grad-norm 0.0: must be positive"),
        (["--init-std", "0"], "--init-std 0.0: must be positive"),
        (["--init-norm", "-1"], "--init-norm -1.0: must be positive"),
        (["--init-std", "1", "--init-norm", "1"], "--init-norm 1.0: or --init-std 1.0 must be"),
        (["--init-norm", "1", "--steps", "9"], "--dim: must be given with --init-norm; or"),
        (["--steps", "0"], "--steps 0: must be a whole number, 1 or more"),
        (["--steps", "1e9"], "--steps 1000000000: must be at most 10000000"),
        (["--steps", "1.5"], "--steps: '1.5' is not a whole number"),
        (["--steps", "inf"], "--steps: 'inf' is not a whole number"),
        (["--steps", "4y"], "--steps: '4y' is not a whole number"),
        (["--steps", "0x"], "--steps: '0x' is out of range; use one like 4x"),
        (["--steps", "nanx"], "--steps: 'nanx' is out of range"),
        (["--steps", "5", "6"], "--steps 6: is the second number; give one of each"),
        (["--steps", "5x", "6x"], "--steps 6.0: is the second factor; give one of each"),
        (["--batch-size", "4"], "--batch-size: '4' is not a factor; use one like 4x"),
        (["--schedule", "cosine"], "--schedule cosine: needs --steps"),
        (["--warmup", "5"], "--warmup 5: needs --steps"),
        (["--steps", "9", "--warmup", "9"], "--warmup 9: must be below --steps 9"),
        (["--steps", "9", "--schedule", "cosin"], "--schedule cosin: must be one of constant"),
        (["--steps", "9", "--final", "0.1"], "--final 0.1: is no option of constant (it has: warm"),
        (["--steps", "9", "--schedule", "wsd", "--decay-fraction", "2"], "--decay-fraction 2.0: m"),
        (["--steps", "9", "--schedule", "wsd", "--gamma", "2"], "--gamma 2.0: is no option of wsd"),
        (["--steps", "9", "--schedule", "step", "--gamma", "0"], "--gamma 0.0: must be positive"),
        (["--plot", "x.png"], "--plot 'x.png': needs a run; give --steps, and --init-std"),
        (["--plot", "x.png", "--steps", "9"], "--plot 'x.png': needs a run; give --init-std or"),
        (["--plot", "no/x.png", "--steps", "9", *START], "--plot 'no/x.png': cannot be written"),
        (["--plot", "x.foo", "--steps", "9", *START], "--plot 'x.foo': cannot be written (Format"),
        (["--lrs", "1"], "unknown arguments --lrs 1"),
    ],
)
def test_bad_options_are_one_line(options, expected, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert expected in refused([*ADAMW, *options], capsys)
    assert list(tmp_path.iterdir()) == []


def test_other_optimizers_are_refused_in_one_line(capsys):
    rest = ["--lr", "1e-3", "--weight-decay", "0.1"]
    assert "OPTIMIZER 'adamx': must be one of sgd" in refused(["adamx", *rest], capsys)
    assert "--dim: must be given" in refused(["adam", *rest], capsys)
    line = refused(["sgd", *rest, "--nesterov"], capsys)
    assert "--nesterov True: needs a momentum" in line
    assert "the following arguments are required: --lr" in refused(["sgd"], capsys)


def test_without_matplotlib_only_plots_are_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = [*ADAMW, "--steps", "9", *START]
    line = refused([*run, "--plot", "x.png"], capsys)
    assert "--plot 'x.png': needs matplotlib; run: pip install \"sphereopt[report]\"" in line
    assert main(["calc", *run]) == 0
