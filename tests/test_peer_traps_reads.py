"""Traps of other libraries, in what a step reads: norms of rounded weights, numbers of a device."""

from unittest.mock import patch

import pytest
import torch
from literature_optimizers import ROWS as PUBLISHED
from optimizers import ROWS, Row
from peers import peer
from readings import Readings
from torch import nn

import sphereopt as so
from sphereopt.geometry import norm

UNSEEN = ("tolist", "numpy")
POLICIES = [
    {"move": "retract"},
    {"move": "exp", "transport": "project"},
    {"move": "renorm", "transport": "rescale"},
    {"move": "hyperball", "transport": "parallel"},
    {"move": "rotate", "transport": "project"},
    {"radius": "free", "weight_decay": 0.1},
]


def reads(optimizer, params):
    """Return how many values that depend on weights or gradients the third step reads."""
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    sources = [*params, *(p.grad for p in params)]
    # On a CPU these two look at memory without an operation.
    unseen = [patch.object(torch.Tensor, name, side_effect=AssertionError(name)) for name in UNSEEN]
    with Readings(sources) as readings, unseen[0], unseen[1]:
        optimizer.step()
    return readings.count


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "-".join(map(str, policy.values())))
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_adamp_waits_for_the_device_and_no_sphere_step_does(row: Row, policy):
    params = [nn.Parameter(torch.randn(5, 7)) for _ in range(4)]
    params.append(nn.Parameter(torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)))
    assert reads(row.make(params, sphere="row", **policy), params) == 0


@pytest.mark.parametrize("row", PUBLISHED, ids=str)
def test_adamp_waits_for_the_device_and_no_published_step_does(row):
    params = [nn.Parameter(torch.randn(5, 7)) for _ in range(4)]
    assert reads(row.make(params), params) == 0


def test_adamp_waits_for_the_device_once_or_twice_per_tensor():
    adamp = pytest.importorskip("adamp")
    with peer("adamp", "0.3.0"):
        params = [nn.Parameter(torch.randn(5, 7)) for _ in range(4)]
        assert 4 <= reads(adamp.AdamP(params), params) <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hyperball_bug_held_norms_are_those_of_the_first_step(dtype):
    # Against the norms of the start, not against the handle's: those would drift along.
    w = nn.Parameter(torch.randn(4, 64).to(dtype))
    start = norm(w.detach(), "row")
    optimizer = torch.optim.SGD([("w", w)], lr=0.05)
    handle = so.constrain(optimizer, {"w": "row"})
    for _ in range(3000):
        w.grad = torch.randn(4, 64).to(dtype)
        optimizer.step()
    assert torch.equal(handle.radius["w"], start)
    # What one rounding of 64 entries leaves: eps/2 each, independent, is far below eps.
    assert (norm(w.detach(), "row") / start - 1).abs().max() < torch.finfo(dtype).eps
