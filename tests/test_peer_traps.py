"""The table of traps is whole, its tests exist, its page is current."""

import ast
import re
from pathlib import Path

import pytest
import torch
from peer_traps import PAGE, PLUMBING, READS, STEPS, TRAPS, page
from peers import peer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sphereopt as so
from sphereopt.geometry import angle, norm

TESTS = Path(__file__).parent


def names(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_has_every_trap_and_a_test_for_each():
    assert list(TRAPS) == list(range(1, 34))
    for number, row in TRAPS.items():
        assert row.tests, number
        assert len(set(row.tests)) == len(row.tests), number
        assert "|" not in row.peer + row.here, number


@pytest.mark.parametrize(
    "file", sorted({t.split("::")[0] for r in TRAPS.values() for t in r.tests})
)
def test_every_test_named_exists(file):
    found = names(TESTS / file)
    for number, row in TRAPS.items():
        for test in row.tests:
            place, name = test.split("::")
            assert place != file or name in found, f"trap {number}: there is no {test}"


def test_every_test_of_these_files_is_in_the_table():
    named = {test for row in TRAPS.values() for test in row.tests}
    for file in (STEPS, PLUMBING, READS):
        written = {name for name in names(TESTS / file[:-2]) if name.startswith("test_")}
        assert written == {t.split("::")[1] for t in named if t.startswith(file)}


def test_a_peer_is_held_to_its_version_and_skipped_in_another():
    with pytest.raises(AssertionError), peer("torch", torch.__version__):
        raise AssertionError
    with pytest.raises(pytest.skip.Exception, match="ours passed; torch"), peer("torch", "0.1"):
        raise AssertionError


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run python tests/peer_traps.py"


def test_the_recipe_of_the_page_runs():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-12))
    x = torch.randn(8, 3, 6, 6)
    report = so.find_spheres(model, x)
    optimizer = so.SphereSGD(so.param_groups(model, report), lr=0.5)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().sin().backward()
        for p in model.parameters():
            p.grad += torch.randn_like(p)
        optimizer.step()
        averaged.update_parameters(model)
    w, mean = model[0].weight.detach(), averaged.module[0].weight.detach()
    assert (norm(mean, "row") < 0.95 * norm(w, "row")).all()
    before = averaged(x)
    exec(code, {"report": report, "model": model, "averaged": averaged})
    torch.testing.assert_close(norm(mean, "row"), norm(w, "row"), rtol=1e-6, atol=0)
    torch.testing.assert_close(averaged(x), before, rtol=1e-4, atol=1e-5)  # float32 sums


@pytest.mark.parametrize(("move", "expected"), [("rotate", 4.5), ("retract", 0.02), (None, 0.02)])
def test_the_figures_of_the_page_on_gradients_that_vanish(move, expected):
    w = nn.Parameter(torch.randn(1, 64))
    plain = torch.optim.AdamW([w], lr=0.01, weight_decay=0.0)
    optimizer = so.SphereAdam([w], lr=0.01, sphere="row", move=move) if move else plain
    turned = 0.0
    for step in range(600):
        before = w.detach().clone()
        w.grad = 1e-3 * torch.randn(1, 64) * (step < 100)
        optimizer.step()
        turned += angle(before, w.detach(), "row").item() * (step >= 100)
    # To the digits of the page, and to where AdamW stood when the gradients ended.
    assert turned == pytest.approx(expected, rel=0.05 if move == "rotate" else 0.5)
