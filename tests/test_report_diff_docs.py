"""docs/diff.md: what it shows is what the command prints, and its thresholds are those used."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from test_report_diff_page import run
from torch import nn

import sphereopt as so
from sphereopt.report.diff import align, cause, course, verdict
from sphereopt.report.diff.difference import _LAST, _ROUNDING, TOLERANCE

PAGE = (Path(__file__).parent.parent / "docs" / "diff.md").read_text(encoding="utf-8")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def train(path, decay):
    """Train three layers to agree with a linear teacher on new inputs at every step."""
    torch.manual_seed(0)
    hidden = [[nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU()] for _ in range(3)]
    model = nn.Sequential(*(layer for block in hidden for layer in block), nn.Linear(16, 5))
    teacher = torch.randn(16, 5)
    groups = so.param_groups(model, {f"{3 * i}.weight": "row" for i in range(3)})
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=decay)
    with so.track(optimizer, path, every=5) as tracker:
        for _ in range(1500):
            x = torch.randn(32, 16)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
            loss.backward()
            tracker.log(loss=loss)
            optimizer.step()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("runs")
    train(found / "a.jsonl", 5e-3)
    train(found / "b.jsonl", 2e-2)
    return found


def test_the_page_shows_what_the_command_prints(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    command, shown = re.search(
        r"```console\n\$ sphereopt diff (.*?)\n(.*?)```", PAGE, re.S
    ).groups()
    assert run(*shlex.split(command)) == 1
    printed = capsys.readouterr().out

    def words(text):
        return " ".join(_NUMBER.sub("#", text).split())

    assert words(printed) == words(shown)
    pairs = zip(_NUMBER.findall(printed), _NUMBER.findall(shown), strict=True)
    # Two digits are shown, and another machine rounds otherwise.
    assert all(float(x) == pytest.approx(float(y), rel=0.1) for x, y in pairs)


def test_the_code_of_the_page_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(block, {"so": so})
    assert Path("diff.html").stat().st_size > 10_000
    assert "because of weight decay" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "held"),
    [
        ("10 %", TOLERANCE == 0.1),
        ("four standard errors", course._SURE == 4),
        ("a tenth of the rows", course._LASTING == 0.1),
        ("a twentieth of the rows", course._width(1000) == 50),
        ("at least five", course._width(60) == 5),
        ("less than a tenth of the sparser log's", align._SHARE == 0.1),
        ("$10^{-5}$", _ROUNDING == 1e-5),
        ("the last tenth", _LAST == 0.1),
        ("within 20 %", verdict._AGREES == 0.2),
        ("a million steps", cause._STEPS == 1_000_000),
    ],
)
def test_thresholds_on_the_page_are_those_of_the_code(said, held):
    assert said in " ".join(PAGE.split())
    assert held
