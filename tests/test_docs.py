"""The code in README and docs runs."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sphereopt as so
from sphereopt.cli import main
from sphereopt.geometry import angle, norm

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
    )
    x = torch.randn(16, 4)
    groups = so.param_groups(model, {"0.weight": "row"})
    optimizer = so.SphereSGD(groups, lr=0.1)

    def train(model, optimizer):
        for _ in range(50):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    return {
        "so": so,
        "torch": torch,
        "model": model,
        "example_input": x,
        "train": train,
        "opt": optimizer,
        "groups": groups,
        "report": so.find_spheres(model, x),
    }


@pytest.mark.parametrize("number", range(len(blocks("README.md"))))
def test_readme(number, tmp_path, monkeypatch):
    exec(blocks("README.md")[number], setting(tmp_path, monkeypatch))


def test_tracking_page(tmp_path, monkeypatch):
    names = setting(tmp_path, monkeypatch)
    model = names["model"]
    names["criterion"] = nn.functional.mse_loss
    names["batches"] = [(x, torch.zeros_like(model(x))) for x in [names["example_input"]] * 3]
    first, second = blocks("docs/tracking.md")
    exec(first, names)
    exec(second, names)
    rows = so.monitor.read_jsonl("run.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["metrics"]["loss"] > 0 for row in rows)


def test_the_tracking_page_names_every_probe():
    page = (ROOT / "docs" / "tracking.md").read_text()
    table = set(re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE))
    named = {name.strip("` ") for cell in table for name in cell.split(",")}
    assert {*so.monitor.PROBES, "diffusive_angle"} <= named


def test_the_cost_on_the_tracking_page_is_what_was_measured():
    found = json.loads((ROOT / "docs/results/tracker_overhead.json").read_text())["results"]
    page = (ROOT / "docs/tracking.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    table = {row[0].strip("| "): row[1:] for row in rows if row[-1].rstrip(" |").endswith("%")}
    wanted = {
        "of a training step, 224 px: every step logged": "224 px: every step (%)",
        "of a training step, 64 px: every step logged": "64 px: every step (%)",
        "kept between steps, of the model": "kept (% of the model)",
        "peak of a logged step": "peak of a logged step (% of the model)",
    }
    for row, key in wanted.items():
        for cell, name in zip(table[row], found, strict=True):
            assert float(cell.split()[0]) == pytest.approx(found[name][key], abs=0.0501), (
                row,
                name,
            )
    ours = [x for name, x in found.items() if name.startswith("Sphere")]
    assert all(x["224 px: every step (%)"] < 1 for x in ours)
    assert all(
        x["peak of a logged step (% of the model)"] - x["peak of a step (% of the model)"] < 1
        for x in ours
    )


def test_detection_page(tmp_path, monkeypatch):
    names = setting(tmp_path, monkeypatch)
    exec(blocks("docs/detection.md")[0].replace("conv1.weight", "0.weight"), names)


def test_the_optimizer_of_the_concepts_page_is_one():
    names: dict = {}
    exec(blocks("docs/concepts.md")[0], names)
    w = nn.Parameter(torch.randn(4, 8, dtype=torch.float64))
    before, start = w.detach().clone(), norm(w.detach(), "row")
    optimizer = names["SphereSignum"]([("w", w)], lr=0.02, sphere="row")
    rows = []
    with so.track(optimizer, rows.append):
        w.grad = torch.randn_like(w)
        optimizer.step()
    torch.testing.assert_close(angle(before, w.detach(), "row"), torch.full((4,), 0.02).double())
    torch.testing.assert_close(norm(w.detach(), "row"), start)
    assert rows[0]["parameters"]["w"]["angle"]["mean"] == pytest.approx(0.02)


def test_audit_page(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "audit.md").read_text()
    (code,) = blocks("docs/audit.md")
    (tmp_path / "small.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    torch.save({"model": names["net"]().state_dict()}, "small.pt")
    commands = re.findall(r"```console\n\$ sphereopt (.*?)\n(.*?)```", page, re.DOTALL)
    ran = 0
    for command, expected in commands:
        argv = shlex.split(command.partition(" > ")[0])
        if argv[1] != "small:net":
            continue
        ran += 1
        assert main(argv) == 0
        out = capsys.readouterr().out
        if expected:
            assert masked(out) == masked(expected), "paste the new output into docs/audit.md"
    assert ran == len(commands) - 1 == 4
    sys.modules.pop("small", None)


def masked(text):
    """Return the text without what rounding changes: measured numbers, and the columns' widths."""
    return re.sub(r" +", " ", re.sub(r"\b\d+(\.\d+)?e-\d+|\b\d\.\d+", "#", text)).strip()
