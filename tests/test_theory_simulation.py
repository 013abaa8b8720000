"""Every formula against random walks of real optimizers.

Sampling noise is about ``1 / sqrt(2 * entries)`` of a norm at any one step: 0.2 % for the 2**17
entries of AdamW's trajectories, 0.4 % for Muon's 2**15; averages over time have less.
Full sizes are in ``benchmarks/theory_simulation.py``.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_walk import CASE, CASES, TRAVELLED, RandomWalk, smooth

from sphereopt.theory import equilibrium, schedule, trajectory
from sphereopt.theory.shapes import newton_schulz

#: As many as the tolerance needs: the size of the gradient is exact, so SGD has little noise, long
#: runs average, and a matrix has sixteen times the weights.
BLOCKS = {"sgd": 128, "sgdw": 128, "adam": 256, "lion": 256, "muon": 8}


def predicted(case):
    return equilibrium(case.optimizer, lr=case.lr, weight_decay=case.weight_decay, **case.sized)


def settled(case, blocks):
    """Return walk and measurements at equilibrium: after eight relaxation times from 1.1 of it."""
    expected = predicted(case)
    walk = RandomWalk(case, [1.1 * expected.norm], blocks=blocks)
    # The lag of the second moment is over 1 / (1 - beta2) steps.
    wait = 2500 if case.hyper.get("betas") == (0.9, 0.999) else max(200, 5 * expected.relaxation)
    walk.run([case.lr] * int(wait))
    return walk, walk.run([case.lr] * max(200, int(3 * expected.relaxation)))


def rms(x):
    return math.sqrt(np.mean(x**2))


def ids(cases):
    return {"argvalues": cases, "ids": [case.label for case in cases]}


@pytest.mark.parametrize("case", **ids(CASES))
def test_norm_and_angle_at_equilibrium(case):
    _, measured = settled(case, blocks=4 if case.optimizer == "muon" else 64)
    expected = predicted(case)
    assert rms(measured.angle) == pytest.approx(expected.angle, rel=case.tolerance)
    assert rms(measured.norm) == pytest.approx(expected.norm, rel=case.tolerance)


@pytest.mark.parametrize("case", **ids(TRAVELLED))
def test_trajectories_from_far_below_and_far_above(case):
    norm = predicted(case).norm
    starts = [0.3 * norm, 3 * norm]
    rates = schedule("cosine", case.lr, case.steps, warmup=case.steps // 10, final=0.05)
    measured = RandomWalk(case, starts, blocks=BLOCKS.get(case.optimizer, 512)).run(rates)
    for i, start in enumerate(starts):
        run = trajectory(
            case.optimizer, lr=rates, weight_decay=case.weight_decay, norm0=start, **case.sized
        )
        np.testing.assert_allclose(measured.norm[:, i], run.norm, rtol=case.tolerance)
        np.testing.assert_allclose(
            smooth(measured.angle[:, i]), smooth(run.angle), rtol=case.tolerance
        )


def test_l2_far_above_equilibrium_is_within_first_order():
    """Where the decay is a third of the gradient: without its kurtosis the norm is 3.5 % off."""
    case = CASE["adam (L2)"]
    start = 3 * predicted(case).norm
    rates = schedule("cosine", case.lr, 400, warmup=40, final=0.05)
    measured = RandomWalk(case, [start], blocks=512).run(rates)
    run = trajectory("adam", lr=rates, weight_decay=case.weight_decay, norm0=start, **case.sized)
    np.testing.assert_allclose(measured.norm[:, 0], run.norm, rtol=0.01)
    np.testing.assert_allclose(smooth(measured.angle[:, 0]), smooth(run.angle), rtol=0.03)


@pytest.mark.parametrize(
    "label",
    [
        "sgd, momentum 0.9",
        "nesterov 0.9",
        "adam (L2)",
        "adamw (0.9, 0.95)",
        "signum",
        # The lag must be several memories of the buffer too: Lion's 100 steps would take long.
        "lion (0.95, 0.98)",
    ],
)
def test_directions_are_forgotten_and_aligned_as_predicted(label):
    case, expected = CASE[label], predicted(CASE[label])
    walk, _ = settled(case, blocks=320)
    kappa = walk.forgetting(lag=int(0.5 * expected.memory), times=3)
    angle = rms(walk.run([case.lr] * 50).angle)
    # cos is 0.37 at the far end with noise of 1/sqrt(3 * 2**16.3), over half a memory: 1 %.
    assert kappa == pytest.approx(expected.kappa, rel=0.025)
    assert 2 * kappa / angle**2 == pytest.approx(expected.K, rel=0.03)
    assert math.sqrt(2 * kappa) == pytest.approx(expected.diffusive_angle, rel=0.01)


@pytest.mark.parametrize("label", ["sgd", "sgd, momentum 0.9", "nesterov 0.5", "sgdw", "adam (L2)"])
def test_gradient_over_weight_at_equilibrium(label):
    case = CASE[label]
    _, measured = settled(case, blocks=64)
    ratio = np.mean(case.grad_norm / measured.norm**2)
    assert ratio == pytest.approx(predicted(case).grad_ratio, rel=0.01)


@pytest.mark.parametrize(("label", "power"), [("sgd", 4), ("sgdw", 4), ("adamw (0.9, 0.95)", 2)])
def test_distances_of_the_norm_fall_by_e_in_a_relaxation_time(label, power):
    # Slow enough for what momentum and the second moment do in between to be nothing.
    case = replace(CASE[label], weight_decay=CASE[label].weight_decay / 5)
    expected = predicted(case)
    walk = RandomWalk(case, [0.9 * expected.norm, 1.1 * expected.norm], blocks=768)
    after, time = 30, round(expected.relaxation)
    # The power of the norm that a linear equation governs: far from equilibrium as near it.
    moment = walk.run([case.lr] * (after + time)).norm ** power
    apart = moment[:, 1] - moment[:, 0]
    # Noise of 0.2 % of the norm is 3 % of what is left of the 20 %.
    fallen = math.log(apart[after - 1] / apart[-1]) * expected.relaxation / time
    assert fallen == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_muon_makes_of_random_matrices_what_is_said(shape):
    """Size of torch's own steps, and their overlap when made of correlated buffers."""
    first, second = torch.randn(2, 60, *shape)

    def steps(gradients):
        params = [torch.nn.Parameter(torch.zeros(shape)) for _ in gradients]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        torch.optim.Muon(params, lr=1.0, weight_decay=0.0, momentum=0.0).step()
        return torch.stack([p.detach() for p in params])

    made, taken = newton_schulz(*shape), steps(first)
    scale = math.sqrt(max(1, shape[0] / shape[1]))
    power = (taken / scale).square().sum((1, 2)).mean().item()
    # Of 60 matrices the mean is known to 0.3 %; the limit of large matrices is as near.
    assert made.power == pytest.approx(power, rel=0.015)
    for rho in (0.1, 0.5, 0.9, 0.97):
        other = steps(rho * first + math.sqrt(1 - rho**2) * second) / scale
        overlap = (other * taken / scale).sum((1, 2)).mean().item() / power
        assert made.overlap(np.array([rho]))[0] == pytest.approx(overlap, abs=0.02)
