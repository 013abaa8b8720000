"""bfloat16 and float16 weights: what rounding does to a step, and the three ways to meet it."""

import copy
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from optimizers import ROWS, Row
from small_model import run
from torch import nn
from torch.nn import functional as F

import sphereopt as so
from sphereopt.geometry import norm
from sphereopt.optim._rounding import stochastic_round

LOW = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", LOW, ids=str)
every_row = pytest.mark.parametrize("row", ROWS, ids=str)


@every_dtype
def test_stochastic_rounding_gives_a_neighbour_and_the_right_mean(dtype):
    info = torch.finfo(dtype)
    # bfloat16 reaches below float32's normal numbers, where the rounding is coarser.
    smallest = info.tiny / 16 if dtype == torch.float16 else 2**20 * info.tiny
    scales = [1.0, 3.3e-3, 700.0, smallest]
    x = torch.cat([s * torch.randn(50) for s in scales])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([stochastic_round(x, dtype, generator) for _ in range(2000)]).float()
    bits = -round(math.log2(info.eps))
    exponent = np.floor(np.log2(np.abs(x.double().numpy())))
    gap = 2.0 ** np.maximum(exponent - bits, math.log2(info.tiny) - bits)
    below = torch.from_numpy(np.floor(x.double().numpy() / gap) * gap)
    above = torch.from_numpy(np.ceil(x.double().numpy() / gap) * gap)
    assert torch.equal(below.to(dtype).double(), below), "the neighbours are of the dtype"
    assert ((draws == below) | (draws == above)).all()
    # 2,000 draws of a coin: the mean is within 5 standard errors of half a gap.
    error = (draws.double().mean(0) - x).abs() / torch.from_numpy(gap)
    assert error.max() < 5 * 0.5 / math.sqrt(2000)


@every_dtype
def test_stochastic_rounding_leaves_alone_what_is_representable(dtype):
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 65280.0, math.inf, -math.inf, math.nan])
    x = torch.cat([x, torch.randn(1000).to(dtype).float()])
    y = stochastic_round(x, dtype, torch.Generator().manual_seed(0))
    torch.testing.assert_close(y.float(), x, rtol=0, atol=0, equal_nan=True)


def turned(rounding, lr, dtype, steps=400):
    """Return the angle made good along a great circle, over the angle asked for."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(16, 256, generator=generator)
    goal = torch.randn(16, 256, generator=generator)
    w = nn.Parameter(start.to(dtype))
    optimizer = so.SphereSGD([w], lr=lr, sphere="row", move="rotate", rounding=rounding)
    unit = F.normalize(w.detach().double(), dim=1)
    side = F.normalize(so.geometry.tangent(unit, goal.double(), "row"), dim=1)
    for _ in range(steps):
        # Always ahead on the circle through start and goal.
        along = (w.detach().double() * unit).sum(1), (w.detach().double() * side).sum(1)
        theta = torch.atan2(along[1], along[0])[:, None]
        w.grad = (theta.sin() * unit - theta.cos() * side).to(dtype)
        optimizer.step()
    x = w.detach().double()
    angle = torch.atan2((x * side).sum(1), (x * unit).sum(1))
    return (angle / (lr * steps)).mean().item()


@every_dtype
@pytest.mark.parametrize("lr", [1e-3, 3e-4])
def test_stochastic_and_master_make_the_angle_asked_for(lr, dtype):
    assert turned("stochastic", lr, dtype) == pytest.approx(1, abs=0.05)
    assert turned("master", lr, dtype) == pytest.approx(1, abs=0.01)


def test_nearest_loses_most_of_a_small_step_and_says_so():
    with pytest.warns(UserWarning, match=r"parameter 'group 0, parameter 0' kept \d+% of its step"):
        assert turned("nearest", 3e-4, torch.bfloat16) < 0.5


def test_in_training_stochastic_rounding_makes_good_the_angle_that_nearest_loses():
    path = Path(__file__).parent.parent / "benchmarks" / "low_precision.py"
    spec = importlib.util.spec_from_file_location("low_precision", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    random = benchmark.run("stochastic", 1e-3, steps=40, seed=0)
    nearest = benchmark.run("nearest", 1e-3, steps=40, seed=0)
    assert random["progress"] == pytest.approx(1, abs=0.05)
    assert not random["warned"]
    assert nearest["progress"] < 0.5
    assert nearest["warned"]


def test_the_warning_is_given_once_and_names_the_layer():
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 32, bias=False)).bfloat16()
    optimizer = so.SphereSGD(model.named_parameters(), lr=1e-4, sphere="row", move="rotate")
    params = list(model.parameters())

    def some():
        return [torch.randn_like(p) for p in params]

    with pytest.warns(UserWarning, match=r"'0.weight' kept .*rounding='stochastic'"):
        run(optimizer, params, [some()])
    run(optimizer, params, [some() for _ in range(16)])  # a second warning would raise


@every_dtype
def test_no_warning_where_steps_survive(dtype):
    w = nn.Parameter(torch.randn(32, 64).to(dtype))
    optimizer = so.SphereSGD([w], lr=2e-2, sphere="row", move="rotate")
    run(optimizer, [w], [[torch.randn(32, 64).to(dtype)] for _ in range(16)])


@every_dtype
@every_row
def test_a_master_copy_is_the_float32_run_rounded(row: Row, dtype):
    start, grads = torch.randn(5, 24).to(dtype), [torch.randn(5, 24).to(dtype) for _ in range(50)]
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    lows = row.make([low], sphere="row", rounding="master")
    highs = row.make([high], sphere="row")
    run(lows, [low], [[g] for g in grads])
    run(highs, [high], [[g.float()] for g in grads])
    assert torch.equal(lows.state[low]["master"], high.detach())
    assert torch.equal(low.detach(), high.detach().to(dtype))


@every_row
def test_ordinary_weights_have_the_same_choice(row: Row):
    start = torch.randn(5, 24).bfloat16()
    grads = [torch.randn(5, 24).bfloat16() for _ in range(50)]
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    lows, highs = row.make([low], rounding="master"), row.make([high])
    run(lows, [low], [[g] for g in grads])
    run(highs, [high], [[g.float()] for g in grads])
    # Our direction and torch's own step differ in float32 rounding.
    torch.testing.assert_close(lows.state[low]["master"], high.detach(), rtol=1e-5, atol=1e-6)
    random = nn.Parameter(start.clone())
    run(row.make([random], rounding="stochastic", lr=1e-5), [random], [[g] for g in grads])
    assert not torch.equal(random.detach(), start)


@every_row
def test_a_weight_written_from_outside_wins_over_its_master(row: Row):
    w = nn.Parameter(torch.randn(4, 8).bfloat16())
    optimizer = row.make([w], sphere="row", rounding="master", lr=0.0)
    run(optimizer, [w], [[torch.randn(4, 8).bfloat16()]])
    loaded = torch.randn(4, 8).bfloat16()
    with torch.no_grad():
        w.copy_(loaded)
    run(optimizer, [w], [[torch.randn(4, 8).bfloat16()]])
    assert torch.equal(w.detach(), loaded)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
@every_dtype
def test_resuming_is_bit_for_bit_and_state_stays_wide(rounding, dtype):
    start = torch.randn(6, 40).to(dtype)
    grads = [torch.randn(6, 40).to(dtype) for _ in range(20)]

    def make(w):
        return so.SphereAdam([w], lr=0.02, sphere="row", rounding=rounding)

    whole = nn.Parameter(start.clone())
    run(make(whole), [whole], [[g] for g in grads])
    first = nn.Parameter(start.clone())
    optimizer = make(first)
    run(optimizer, [first], [[g] for g in grads[:10]])
    second = nn.Parameter(first.detach().clone())
    resumed = make(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    # Stochastic rounding draws from the step, not from the global generator.
    torch.manual_seed(99)
    run(resumed, [second], [[g] for g in grads[10:]])
    assert torch.equal(second.detach(), whole.detach())
    widths = {key: x.dtype for key, x in resumed.state[second].items()}
    assert widths.pop("radius") == torch.float64
    assert set(widths.values()) == {torch.float32}


def test_stochastic_rounding_leaves_the_global_generator_alone():
    w = nn.Parameter(torch.randn(6, 40).bfloat16())
    optimizer = so.SphereSGD([w], lr=0.02, sphere="row", rounding="stochastic")
    before = torch.get_rng_state()
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_norms_hold_for_3000_steps(rounding):
    w = nn.Parameter(torch.randn(8, 256).bfloat16())
    start = norm(w.detach(), "row")
    optimizer = so.SphereSGD([w], lr=1e-3, sphere="row", move="rotate", rounding=rounding)
    for _ in range(3000):
        w.grad = torch.randn(8, 256).bfloat16()
        optimizer.step()
    # One rounding of 256 entries: independent errors of at most eps each, far below eps together.
    assert (norm(w.detach(), "row") / start - 1).abs().max() < torch.finfo(torch.bfloat16).eps / 4


def test_autocast_keeps_float32_weights_and_their_norms():
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.LayerNorm(16), nn.Linear(16, 4))
    groups = so.param_groups(net, {"0.weight": "tensor"})
    optimizer = so.SphereAdam(groups, lr=1e-2)
    start = norm(net[0].weight.detach())
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(torch.randn(16, 8)), torch.randint(4, (16,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert net[0].weight.dtype == torch.float32
    torch.testing.assert_close(norm(net[0].weight.detach()), start, rtol=1e-6, atol=0)


def test_an_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="rounding='up' is none of 'nearest', 'stochastic'"):
        so.SphereSGD([nn.Parameter(torch.ones(2, 2))], rounding="up")
