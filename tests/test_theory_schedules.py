"""Schedules against torch's and transformers' own, and schedulers played ahead."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as ls

from sphereopt.theory import OutOfRangeError, equilibrium, schedule, trajectory
from sphereopt.theory.played import played


def stepped(optimizer, scheduler, steps):
    """Return what every group has at every step of a real run."""
    rows = [[] for _ in optimizer.param_groups]
    for _ in range(steps):
        for row, group in zip(rows, optimizer.param_groups, strict=True):
            row.append({k: v for k, v in group.items() if k != "params"})
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
    return rows


def rates(make, steps, lr=0.3):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr)
    return [row["lr"] for row in stepped(optimizer, make(optimizer), steps)[0]]


def warmed(optimizer, main, warmup):
    """From 1/warmup of the peak at the first step to the peak at the last of the warm-up."""
    first = ls.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    return ls.SequentialLR(optimizer, [first, main], [warmup])


@pytest.mark.parametrize(
    ("kind", "options", "make"),
    [
        ("constant", {}, lambda o: ls.ConstantLR(o, 1.0)),
        ("linear", {}, lambda o: ls.LinearLR(o, 1.0, 1e-16, total_iters=50)),
        ("linear", {"final": 0.2}, lambda o: ls.LinearLR(o, 1.0, 0.2, total_iters=50)),
        ("cosine", {}, lambda o: ls.CosineAnnealingLR(o, 50)),
        ("cosine", {"final": 0.1}, lambda o: ls.CosineAnnealingLR(o, 50, eta_min=0.03)),
        (
            "cosine",
            {"final": 0.1, "warmup": 8},
            lambda o: warmed(o, ls.CosineAnnealingLR(o, 42, eta_min=0.03), 8),
        ),
        ("step", {}, lambda o: ls.MultiStepLR(o, [25, 38])),
        (
            "step",
            {"milestones": (0.3, 0.6, 0.9), "gamma": 0.5},
            lambda o: ls.MultiStepLR(o, [15, 30, 45], gamma=0.5),
        ),
    ],
)
def test_schedules_are_those_of_torch(kind, options, make):
    expected = rates(make, 50)
    np.testing.assert_allclose(schedule(kind, 0.3, 50, **options), expected, rtol=1e-12)


@pytest.mark.parametrize("warmup", [0, 10])
def test_schedules_are_those_of_transformers_but_for_the_first_step_of_warmup(warmup):
    optimization = pytest.importorskip("transformers.optimization")

    # transformers warms up from 0 and is at the peak one step later.
    later = int(warmup > 0)

    def compare(kind, make, **options):
        expected = rates(make, 50 + later)[later:]
        ours = schedule(kind, 0.3, 50, warmup=warmup, **options)
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)

    total, late = 50 + later, warmup + later
    compare("constant", lambda o: optimization.get_constant_schedule_with_warmup(o, warmup))
    if warmup == 0:
        compare("cosine", lambda o: optimization.get_cosine_schedule_with_warmup(o, 0, 50))
        compare("linear", lambda o: optimization.get_linear_schedule_with_warmup(o, 0, 50))
        stable, decay = 40, 10
        compare(
            "wsd",
            lambda o: optimization.get_wsd_schedule(
                o, 0, decay, num_stable_steps=stable, decay_type="linear"
            ),
        )
    else:
        # Their warm-up takes one step more: what comes after is shifted by it.
        ours = schedule("cosine", 0.3, 50, warmup=warmup)
        theirs = rates(
            lambda o: optimization.get_cosine_schedule_with_warmup(o, late - 1, total - 1), 50
        )
        np.testing.assert_allclose(ours[warmup:], theirs[warmup:], rtol=1e-9)
        np.testing.assert_allclose(ours[: warmup - 1], theirs[1:warmup], rtol=1e-12)


def test_the_last_fifth_falls_in_wsd():
    ours = schedule("wsd", 2.0, 110, warmup=10, final=0.5)
    np.testing.assert_allclose(ours[:10], 0.2 * np.arange(1, 11))
    np.testing.assert_array_equal(ours[10:90], 2.0)
    np.testing.assert_allclose(ours[90:], 2.0 - np.arange(20) / 20)


def lambdas(o):
    return [lambda t: 0.9**t] * len(o.param_groups)


SCHEDULERS = {
    "lambda": lambda o: ls.LambdaLR(o, lambdas(o)),
    "multiplicative": lambda o: ls.MultiplicativeLR(o, lambda t: 0.97),
    "step": lambda o: ls.StepLR(o, 7),
    "multistep": lambda o: ls.MultiStepLR(o, [5, 9]),
    "constant": lambda o: ls.ConstantLR(o, 0.2, 6),
    "linear": lambda o: ls.LinearLR(o, 0.1, total_iters=8),
    "exponential": lambda o: ls.ExponentialLR(o, 0.9),
    "polynomial": lambda o: ls.PolynomialLR(o, 25, 2.0),
    "cosine": lambda o: ls.CosineAnnealingLR(o, 30),
    "restarts": lambda o: ls.CosineAnnealingWarmRestarts(o, 5, 2),
    "onecycle": lambda o: ls.OneCycleLR(o, 0.7, total_steps=60),
    "cyclic": lambda o: ls.CyclicLR(o, 0.01, 0.5, 6, mode="triangular2"),
    "sequential": lambda o: ls.SequentialLR(
        o, [ls.LinearLR(o, 0.1, total_iters=5), ls.CosineAnnealingLR(o, 20)], [5]
    ),
    "chained": lambda o: ls.ChainedScheduler(
        [ls.ConstantLR(o, 0.5, 4), ls.ExponentialLR(o, 0.95)], optimizer=o
    ),
}


def small(kind):
    """Return an optimizer of two groups."""
    parts = [{"params": [nn.Parameter(torch.zeros(3))], "lr": lr} for lr in (0.2, 0.05)]
    if kind == "adamw":
        return torch.optim.AdamW(parts, weight_decay=0.1, betas=(0.8, 0.9))
    return torch.optim.SGD(parts, momentum=0.9, weight_decay=0.01)


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("ahead", [0, 4])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_playing_a_scheduler_is_stepping_it(name, ahead, kind):
    optimizer = small(kind)
    scheduler = SCHEDULERS[name](optimizer)
    stepped(optimizer, scheduler, ahead)
    before = copy.deepcopy((optimizer.state_dict(), plain(scheduler.state_dict())))
    foreseen = played(scheduler, 25)
    assert str((optimizer.state_dict(), plain(scheduler.state_dict()))) == str(before)
    happened = stepped(optimizer, scheduler, 25)
    for group, rows in zip(foreseen, happened, strict=True):
        assert set(group) == {"lr", "weight_decay"} | {"sgd": {"momentum"}}.get(kind, {"betas"})
        for key, values in group.items():
            np.testing.assert_array_equal(values, [row[key] for row in rows], err_msg=key)


def plain(state):
    """Return a scheduler's state without the functions, whose copies print differently."""
    if isinstance(state, dict):
        return {k: plain(v) for k, v in state.items() if not callable(v)}
    if isinstance(state, list):
        return [plain(v) for v in state]
    return state


def test_onecycle_moves_the_momentum_and_is_followed():
    optimizer = small("sgd")
    momentum = played(ls.OneCycleLR(optimizer, 0.7, total_steps=60), 60)[0]["momentum"]
    assert momentum.min() == pytest.approx(0.85)
    assert momentum.max() == pytest.approx(0.95)


def test_parameters_and_their_state_are_not_copied():
    class Stubborn(torch.Tensor):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    p = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["momentum_buffer"] = torch.zeros(3).as_subclass(Stubborn)
    assert len(played(ls.ExponentialLR(optimizer, 0.9), 3)[0]["lr"]) == 3


def test_the_step_after_playing_does_not_warn():
    optimizer = small("sgd")
    scheduler = ls.ExponentialLR(optimizer, 0.9)
    played(scheduler, 3)
    stepped(optimizer, scheduler, 2)


def test_trajectories_take_schedulers():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    scheduler = ls.CosineAnnealingLR(optimizer, 40)
    options = {"weight_decay": 0.1, "norm0": 1.0, "grad_norm": 1.0}
    run = trajectory("sgd", lr=scheduler, steps=40, **options)
    other = trajectory("sgd", lr=schedule("cosine", 0.1, 40), **options)
    np.testing.assert_allclose(run.norm, other.norm, rtol=1e-12)
    with pytest.raises(OutOfRangeError, match="steps=None must be given with a scheduler"):
        trajectory("sgd", lr=scheduler, **options)


def test_a_scheduler_that_follows_a_metric_is_refused():
    scheduler = ls.ReduceLROnPlateau(small("sgd"))
    with pytest.raises(OutOfRangeError, match="ReduceLROnPlateau' follows a metric and cannot"):
        played(scheduler, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cosin"}, "schedule='cosin' must be one of constant, linear, cosine, wsd, step"),
        ({"peak": 0.0}, "lr=0.0 must be positive"),
        ({"steps": 0}, "steps=0 must be a whole number, 1 or more"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"warmup": -1}, "warmup=-1 must be a whole number, 0 or more"),
        ({"warmup": 9}, "warmup=9 must be below steps=9"),
        ({"final": -0.1}, "final=-0.1 must be 0 or more"),
        ({"gamma": 0.0}, "gamma=0.0 must be positive"),
        ({"decay_fraction": 0.0}, "decay_fraction=0.0 must be over 0, at most 1"),
        ({"decay_fraction": 1.1}, "decay_fraction=1.1 must be over 0, at most 1"),
        ({"peak": math.nan}, "lr=nan must be positive"),
        ({"peak": "much"}, "lr='much' must be a number"),
    ],
)
def test_schedules_refuse(options, message):
    with pytest.raises(OutOfRangeError, match=message):
        schedule(**{"kind": "cosine", "peak": 0.1, "steps": 9, **options})


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("sgd", {"momentum": 0.9}),
        ("sgd", {"momentum": 0.9, "dampening": 0.5}),
        ("sgdw", {"momentum": 0.9}),
        ("adam", {"dim": 64, "eps": 0.0}),
        ("adamw", {"dim": 64, "eps": 0.0}),
    ],
)
def test_where_it_settles_follows_rate_decay_and_gradient(optimizer, options):
    rates, decays = schedule("cosine", 1e-2, 50, final=0.1), np.linspace(0.1, 0.02, 50)
    grads = np.geomspace(0.1, 10.0, 50)
    run = trajectory(
        optimizer, lr=rates, weight_decay=decays, norm0=1.0, grad_norm=grads, **options
    )
    for t in (0, 20, 49):
        one = {"lr": rates[t], "weight_decay": decays[t], "grad_norm": grads[t]}
        # Interpolated between 33 values of a function that hardly varies.
        settled = equilibrium(optimizer, **one, **options).norm
        assert run.equilibrium[t] == pytest.approx(settled, rel=1e-4)
