"""Equilibrium and trajectory against closed forms, and what they refuse and warn of."""

import ast
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import sphereopt.theory as theory
from sphereopt.theory import OPTIMIZERS, OutOfRangeError, equilibrium, trajectory

#: Every optimizer with options that are not its defaults.
EVERY = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "dampening": 0.3}),
    ("sgd", {"momentum": 0.6, "nesterov": True}),
    ("sgdw", {"momentum": 0.9}),
    ("adam", {"betas": (0.9, 0.98), "eps": 0.0}),
    ("adamw", {"betas": (0.9, 0.95), "eps": 0.0}),
    ("adamw", {"betas": (0.0, 0.95), "eps": 0.0}),
    ("sign", {}),
    ("signum", {"momentum": 0.8}),
    ("lion", {"betas": (0.9, 0.95)}),
    ("muon", {"shape": (16, 64)}),
    ("muon", {"shape": (64, 16), "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
]
SMALL = [1e-12, 1e-8, 1e-4, 2e-3]


def sized(name, dim=1024, grad_norm=0.7):
    return {"grad_norm": grad_norm} | ({} if name == "muon" else {"dim": dim})


# Closed forms, exact in lr * weight_decay


@pytest.mark.parametrize("product", SMALL)
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_sgd_has_the_cosine_and_norm_of_wan_et_al(mu, product):
    lr, ghat = 0.3, 1.7
    wd = product / lr
    found = equilibrium("sgd", lr=lr, weight_decay=wd, momentum=mu, grad_norm=ghat)
    # cos(angle) = 1 - x, where 1 - cos would lose the digits.
    assert found.angle == pytest.approx(2 * math.asin(math.sqrt(product / (1 + mu) / 2)), rel=1e-9)
    square = lr * ghat**2 / (wd * (1 - mu) * (2 - product / (1 + mu)))
    assert found.norm == pytest.approx(square**0.25, rel=1e-9)
    assert found.grad_ratio == pytest.approx(ghat / found.norm**2, rel=1e-12)
    assert found.diffusive_angle == pytest.approx(math.sqrt(2 * found.kappa), rel=1e-12)
    assert found.K * found.angle**2 == pytest.approx(2 * found.kappa, rel=1e-12)
    assert found.memory == pytest.approx(1 / found.kappa, rel=1e-12)


@pytest.mark.parametrize("product", [2e-3, 9e-3])  # In swings at 0.9: beyond 2.6e-3.
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_sgd_forgets_at_the_root_of_its_characteristic_equation(mu, product):
    found = equilibrium("sgd", lr=0.1, weight_decay=product / 0.1, momentum=mu)
    roots = np.roots([1, -(1 + mu - product), mu])
    assert found.kappa == pytest.approx(-math.log(max(abs(roots))), rel=1e-9)


@pytest.mark.parametrize("product", SMALL)
def test_sgdw_has_its_own_cosine_norm_and_memory(product):
    lr, mu, ghat = 0.3, 0.9, 1.7
    wd, a = product / lr, 1 - product
    found = equilibrium("sgdw", lr=lr, weight_decay=wd, momentum=mu, grad_norm=ghat)
    # 1 - cos = (1 - a)(1 - mu) / (1 + a mu)
    half = math.sqrt(product * (1 - mu) / (1 + a * mu) / 2)
    assert found.angle == pytest.approx(2 * math.asin(half), rel=1e-9)
    lost = product * (1 + a)
    square = (lr * ghat) ** 2 * (1 + a * mu) / ((1 - mu**2) * lost * (1 - a * mu))
    assert found.norm == pytest.approx(square**0.25, rel=1e-9)
    assert found.kappa == pytest.approx(-math.log1p(-product), rel=1e-12)


def test_dampening_is_a_smaller_learning_rate():
    damped = equilibrium("sgd", lr=0.1, weight_decay=0.01, momentum=0.9, dampening=0.7, grad_norm=2)
    plain = equilibrium("sgd", lr=0.03, weight_decay=0.01, momentum=0.9, grad_norm=2)
    for name in ("angle", "kappa", "norm", "relaxation"):
        assert getattr(damped, name) == pytest.approx(getattr(plain, name), rel=1e-12)


def test_adamw_has_its_norm_with_the_correlation_of_weights_and_updates():
    lr, wd, b1, dim = 1e-2, 0.5, 0.9, 100
    # With beta2 near 1 the second moment does not fluctuate.
    found = equilibrium("adamw", lr=lr, weight_decay=wd, betas=(b1, 1 - 1e-9), dim=dim)
    a = 1 - lr * wd
    square = lr**2 * dim * (1 - b1) / (1 + b1) * (1 + a * b1) / ((1 - a * a) * (1 - a * b1))
    assert found.norm == pytest.approx(math.sqrt(square), rel=1e-7)
    assert found.rms == pytest.approx(math.sqrt(square / dim), rel=1e-7)
    cos = (1 + a * a - lr**2 * dim * (1 - b1) / (1 + b1) / square) / (2 * a)
    assert found.angle == pytest.approx(math.acos(cos), rel=1e-6)


# Closed forms, to leading order


@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_nesterov_steps_are_longer(mu):
    lr, wd = 0.1, 1e-7
    found = equilibrium("sgd", lr=lr, weight_decay=wd, momentum=mu, nesterov=True)
    square = 2 * lr * wd * (1 + 2 * mu - 2 * mu**3) / (1 + mu)
    assert found.angle == pytest.approx(math.sqrt(square), rel=1e-5)
    assert found.kappa == pytest.approx(lr * wd / (1 - mu), rel=1e-5)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_adamw_has_the_rms_of_the_root_of_half_lr_over_decay(b1):
    lr, wd = 1e-4, 1e-4
    found = equilibrium("adamw", lr=lr, weight_decay=wd, betas=(b1, 1 - 1e-9))
    assert found.rms == pytest.approx(math.sqrt(lr / (2 * wd)), rel=1e-6)
    assert found.angle == pytest.approx(math.sqrt(2 * lr * wd * (1 - b1) / (1 + b1)), rel=1e-6)
    assert found.norm is None


def test_adam_with_l2_has_a_cube_of_the_norm():
    lr, wd, dim, ghat, b1 = 1e-5, 1e-5, 400, 3.0, 0.9
    found = equilibrium(
        "adam", lr=lr, weight_decay=wd, dim=dim, grad_norm=ghat, betas=(b1, 1 - 1e-9), eps=0
    )
    norm = (lr * 20 * ghat / (2 * wd)) ** (1 / 3)
    assert found.norm == pytest.approx(norm, rel=1e-4)
    assert found.kappa == pytest.approx(lr * wd * 20 * norm / ghat, rel=1e-4)
    assert found.relaxation == pytest.approx(1 / (3 * found.kappa), rel=1e-12)
    assert found.angle == pytest.approx(math.sqrt(2 * found.kappa * (1 - b1) / (1 + b1)), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "hyper", "first", "decay"),
    [
        ("sign", {}, 0.0, 0.0),
        ("signum", {"momentum": 0.9}, 0.9, 0.9),
        ("lion", {"betas": (0.9, 0.99)}, None, 0.99),
        ("lion", {"betas": (0.95, 0.98)}, None, 0.98),
    ],
)
def test_K_of_sign_is_a_sum_of_arcsines(name, hyper, first, decay):
    if first is None:
        b1, b2 = hyper["betas"]
        size = (1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)
        first = (b1 * (1 - b1) * (1 - b2) + b1**2 * b2 * (1 - b2) / (1 + b2)) / size
    K = 1 + 4 / math.pi * np.sum(np.arcsin(first * decay ** np.arange(0.0, 5000.0)))
    lr, wd, dim = 1e-5, 1e-5, 64
    found = equilibrium(name, lr=lr, weight_decay=wd, dim=dim, **hyper)
    # Lags below 1e-5 are left out of the sum beyond its linear part.
    aligned = found.K
    assert aligned == pytest.approx(K, rel=1e-5)
    assert found.norm == pytest.approx(math.sqrt(lr * dim * K / (2 * wd)), rel=1e-5)
    assert found.kappa == pytest.approx(lr * wd, rel=1e-8)


def test_eps_makes_steps_smaller():
    options = {"lr": 1e-3, "weight_decay": 0.1, "dim": 10_000, "grad_norm": 1.0}
    free = equilibrium("adamw", eps=0.0, **options)
    grad_rms = free.grad_ratio * free.norm / 100
    tied = equilibrium("adamw", eps=grad_rms, **options)
    # Where eps is the gradient's size, the divisor doubles; then the norm falls and the gradient
    # grows: r = (lr d / 2 wd)^(1/2) / (1 + eps sqrt(d) r / ghat), x = r / free: x (1 + x) = 1.
    assert tied.norm / free.norm == pytest.approx((math.sqrt(5) - 1) / 2, rel=1e-3)


# Laws of motion


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_decay_the_fourth_power_of_the_norm_grows_linearly(momentum):
    lr, ghat, start, steps = 0.1, 1.0, 30.0, 20_000
    run = trajectory(
        "sgd",
        lr=lr,
        weight_decay=0.0,
        steps=steps,
        norm0=start,
        grad_norm=ghat,
        momentum=momentum,
    )
    t = np.arange(1, steps + 1)
    law = (start**4 + 2 * (lr * ghat / (1 - momentum)) ** 2 * t) ** 0.25
    # The first steps of momentum are shorter: some tens of 20000.
    np.testing.assert_allclose(run.norm, law, rtol=1e-6 if momentum == 0 else 1e-3)
    assert np.all(np.isinf(run.equilibrium))
    assert run.memories == 0


def test_without_decay_the_angle_forgets_the_learning_rate():
    for lr in (0.5, 5.0):
        run = trajectory("sgd", lr=lr, weight_decay=0.0, steps=40_000, norm0=lr**0.5, grad_norm=1)
        assert run.angle[-1] == pytest.approx(1 / math.sqrt(2 * 40_000), rel=1e-3)
        run = trajectory("adamw", lr=lr, weight_decay=0.0, steps=40_000, rms0=lr, betas=(0.0, 0.95))
        assert run.angle[-1] == pytest.approx(1 / math.sqrt(40_000), rel=1e-2)


@pytest.mark.parametrize(("name", "hyper"), EVERY)
def test_a_long_run_ends_at_the_fixed_point(name, hyper):
    wd = 1e-3 if name == "adam" else 0.05
    options = {"lr": 0.01, "weight_decay": wd, **sized(name), **hyper}
    settled = equilibrium(name, **options)
    # Once relaxed, the second moment of Adam still lags by 50 steps.
    steps = int(30 * settled.relaxation) + 1000
    run = trajectory(name, steps=steps, norm0=1.3 * settled.norm, **options)
    assert run.norm[-1] == pytest.approx(settled.norm, rel=1e-8)
    assert run.angle[-1] == pytest.approx(settled.angle, rel=1e-6)
    np.testing.assert_allclose(run.equilibrium, settled.norm, rtol=1e-9)
    assert run.settled[-1]
    assert not run.settled[0]
    np.testing.assert_array_equal(run.weight_decay, np.full(steps, wd))
    # What is summed along the run is kappa to leading order in lr * weight_decay / (1 - mu)^2.
    assert run.memories == pytest.approx(steps * settled.kappa, rel=0.06)


@pytest.mark.parametrize(("name", "hyper"), EVERY)
def test_small_distances_fall_by_e_in_a_relaxation_time(name, hyper):
    wd = 1e-6 if name == "adam" else 1e-3
    options = {"lr": 0.01, "weight_decay": wd, **sized(name), **hyper}
    settled = equilibrium(name, **options)
    n = round(settled.relaxation)
    near, far = (
        trajectory(name, steps=2 * n, norm0=x * settled.norm, **options).norm for x in (0.99, 1.01)
    )
    apart = far - near
    # Corrections are of the order of relaxation times 1 / (1 - beta): half a percent.
    assert math.log(apart[n - 1] / apart[-1]) == pytest.approx(n / settled.relaxation, rel=0.01)


@pytest.mark.parametrize("factor", [0.2, 3.0])
@pytest.mark.parametrize(("name", "hyper"), EVERY)
def test_rescaling_leaves_every_angle_alone(name, hyper, factor):
    i, j = {"sgd": (2, 2), "sgdw": (2, 2), "adam": (1, 2)}.get(name, (1, 1))
    lr = 0.01 * np.abs(np.sin(np.arange(1, 301)))
    wd = np.linspace(0.2, 0.0, 300)
    first = trajectory(name, lr=lr, weight_decay=wd, norm0=2.0, **sized(name), **hyper)
    second = trajectory(
        name,
        lr=factor**i * lr,
        weight_decay=wd / factor**j,
        norm0=2.0 * factor,
        **sized(name),
        **hyper,
    )
    np.testing.assert_allclose(second.angle, first.angle, rtol=1e-9)
    np.testing.assert_allclose(second.norm, factor * first.norm, rtol=1e-11)
    np.testing.assert_allclose(second.equilibrium, factor * first.equilibrium, rtol=1e-3)


# Numbers


@pytest.mark.parametrize(("name", "hyper"), EVERY)
def test_tiny_products_keep_their_digits(name, hyper):
    big, tiny = (
        equilibrium(name, lr=1e-6, weight_decay=wd, **sized(name), **hyper) for wd in (1e-5, 1e-6)
    )
    aligned = tiny.K
    assert aligned == pytest.approx(big.K, rel=1e-4)
    power = {"sgd": 1, "sgdw": 1, "adam": 2 / 3}.get(name, 1)
    assert tiny.kappa / big.kappa == pytest.approx(0.1**power, rel=1e-4)


def test_a_million_steps_run():
    run = trajectory("adamw", lr=1e-4, weight_decay=0.1, steps=1_000_000, rms0=0.02)
    assert run.rms[-1] == pytest.approx(equilibrium("adamw", lr=1e-4, weight_decay=0.1).rms)


# Records and modules


def test_records_are_frozen_and_readable():
    found = equilibrium("sgd", lr=0.1, weight_decay=0.1, momentum=0.9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.angle = 1.0
    text = str(found)
    assert text.startswith("sgd at equilibrium\n  angle            0.1026  rad per step (5.88")
    assert "warning: momentum oscillation" in text
    assert "norm  " not in text.replace("until the norm", "")
    run = trajectory("sgd", lr=0.1, weight_decay=0.1, steps=9, norm0=1.0, grad_norm=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.norm = None
    assert repr(run) == "<Trajectory of sgd, 9 steps>"
    lines = str(run).splitlines()
    assert lines[0] == "sgd, 9 steps, 0.09 memories"
    assert lines[1].split() == ["step", "lr", "norm", "angle"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "2", "4", "6", "8"]


def test_every_optimizer_is_tested():
    assert {name for name, _ in EVERY} == set(OPTIMIZERS)


def test_theory_imports_torch_nowhere_at_the_top():
    for path in Path(theory.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            names = [alias.name for alias in getattr(node, "names", [])]
            origin = getattr(node, "module", None)
            for name in names if isinstance(node, ast.Import) else [origin] * (origin is not None):
                root = name.split(".")[0]
                assert root in {"numpy", "sphereopt"} or root in sys.stdlib_module_names
                # So that the modules they take from the package do not need torch either.
                if root == "sphereopt":
                    assert name.split(".")[1] in {"theory", "names"}, f"{path.name}: {name}"


def test_the_error_is_a_value_error_that_names_its_parts():
    with pytest.raises(ValueError, match="momentum=1 must be 0 or more and below 1") as caught:
        equilibrium("sgd", lr=0.1, weight_decay=0.1, momentum=1)
    error = caught.value
    assert isinstance(error, OutOfRangeError)
    assert (error.name, error.value) == ("momentum", 1)
    assert str(error) == f"momentum=1 {error.remedy}"
