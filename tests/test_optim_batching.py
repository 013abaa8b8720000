"""How tensors are stacked and cut for a step is nobody's business: the numbers are the same."""

import pytest
import torch
from optimizers import ROWS, Row
from small_model import run
from torch import nn

import sphereopt as so
from sphereopt.optim import _batching

every_row = pytest.mark.parametrize("row", ROWS, ids=str)


@pytest.mark.parametrize("policy", [{"radius": "fixed"}, {"radius": "free"}], ids=str)
@every_row
def test_stacking_and_cutting_change_nothing_but_rounding(row: Row, policy, monkeypatch):
    shapes = [(4, 6), (2, 6), (7, 6), (5, 3), (300, 20)]
    start = [torch.randn(s, dtype=torch.float64) for s in shapes]
    grads = [[torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(10)]
    results = []
    for foreach, large in ((False, 1 << 30), (None, 1 << 30), (None, 1000)):
        monkeypatch.setitem(_batching.LARGE, "cpu", large)
        params = [nn.Parameter(x.clone()) for x in start]
        optimizer = row.make(params, sphere="row", foreach=foreach, **policy)
        run(optimizer, params, grads)
        results.append((params, [optimizer.state[p] for p in params]))
    for params, states in results[1:]:
        for p, q in zip(params, results[0][0], strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-13)
        for mine, theirs in zip(states, results[0][1], strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine:
                torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=1e-12)


def test_stacking_keeps_parameters_of_different_age_apart():
    # Adam's bias correction depends on the age; one of these got no gradient at first.
    params = [nn.Parameter(torch.randn(2, 6, dtype=torch.float64)) for _ in range(4)]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    together = so.SphereAdam(params, lr=0.1, sphere="row")
    single = [so.SphereAdam([p], lr=0.1, sphere="row") for p in alone]
    for step in range(5):
        grads = [torch.randn(2, 6, dtype=torch.float64) for _ in params]
        if step < 2:
            grads[3] = None
        run(together, params, [grads])
        for optimizer, p, g in zip(single, alone, grads, strict=True):
            run(optimizer, [p], [[g]])
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-13)
