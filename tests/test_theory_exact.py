"""Conversions that claim to be exact, on networks with real optimizers; and some that are not."""

import math

import numpy as np
import pytest
import torch
from theory_nets import apart, batches, make, network, train, unit
from torch import nn
from torch.nn import functional

import sphereopt as so
from sphereopt.theory import (
    OutOfRangeError,
    adamc,
    rescaled,
    schedule,
    sphere_sgd_lr,
    trajectory,
    without_weight_decay,
)

STEPS = 300
# Measured: mostly 5e-15, at worst 3e-12. Rounding is all there is, and 300 steps amplify it.
EXACT = 1e-10
SHAPES = {
    "constant": np.ones(STEPS),
    "warm-up and cosine": schedule("cosine", 1.0, STEPS, warmup=30, final=0.05),
}
# Weights are forgotten 0.6 to 6 times: decay is not small.
CASES = (
    ("sgd", 0.1, 0.05, {}),
    ("sgd", 0.1, 0.02, {"momentum": 0.9}),
    ("sgd", 0.1, 0.02, {"momentum": 0.9, "dampening": 0.5}),
    ("sgdw", 0.1, 0.05, {"momentum": 0.9}),
    ("sgdw", 0.1, 0.05, {"momentum": 0.9, "nesterov": True}),
    ("adamw", 3e-3, 2.0, {"betas": (0.9, 0.95), "eps": 1e-4}),
    ("sign", 1e-3, 5.0, {}),
    ("signum", 1e-3, 5.0, {"momentum": 0.9}),
    ("lion", 1e-3, 5.0, {"betas": (0.9, 0.99)}),
    ("muon", 3e-3, 2.0, {"shape": (24, 64)}),
)
NAMES = [f"{name} {' '.join(h)}".strip() for name, _, _, h in CASES]
ALPHA_LR, ALPHA_DECAY, MOMENTUM = 0.1, 0.02, 0.9


def constant(value):
    return np.full(STEPS, value)


@pytest.mark.parametrize("kind", ["bn", "ln"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "lr", "decay", "hyper"), CASES, ids=NAMES)
def test_decay_is_removed_exactly(kind, shape, name, lr, decay, hyper):
    rates, decays = lr * SHAPES[shape], decay * (2 - SHAPES[shape])
    free = without_weight_decay(name, lr=rates, weight_decay=decays, dtype="float64", **hyper)
    original = list(train(name, kind, rates, decays, **hyper))
    without = list(train(name, kind, free.lr, constant(0.0), scales=free.grad_scale, **hyper))
    assert apart(original, without, kind) < EXACT
    for a, ours, theirs in zip(free.shrinkage[1:], original, without, strict=True):
        for w, v in zip(ours, theirs, strict=True):
            torch.testing.assert_close(w, a * v, rtol=EXACT, atol=EXACT)
    assert free.shrinkage[-1] < 0.6


def test_sgd_needs_no_scaled_gradients():
    free = without_weight_decay("sgd", lr=0.1, weight_decay=0.01, steps=9, momentum=0.9)
    assert np.all(free.grad_scale == 1)


def test_without_decay_nothing_changes():
    for name in ("sgd", "adamw"):
        free = without_weight_decay(name, lr=[0.1, 0.2], weight_decay=0.0)
        assert free.lr.tolist() == [0.1, 0.2]
        assert free.shrinkage.tolist() == [1, 1, 1]


def root():
    """Return the larger root of x^2 - (1 + mu - lr*decay) x + mu."""
    middle = (1 + MOMENTUM - ALPHA_LR * ALPHA_DECAY) / 2
    return middle + math.sqrt(middle**2 - MOMENTUM)


def drift(name, free_name, kind, rates, lr, decay, buffer=None, **hyper):
    """Return how far a run with decay and one without, at other rates, come apart."""
    original = train(name, kind, constant(lr), constant(decay), buffer=buffer, **hyper)
    return apart(original, train(free_name, kind, rates, constant(0.0), **hyper), kind)


@pytest.mark.parametrize("kind", ["bn", "ln"])
def test_the_exponential_schedule_is_exact_only_with_its_own_initial_buffer(kind):
    alpha, lr = root(), ALPHA_LR
    rates = lr * alpha ** -(2 * np.arange(STEPS) + 1.0)
    given = {"lr": lr, "decay": ALPHA_DECAY, "momentum": MOMENTUM}
    buffer = (1 - alpha) / (alpha * lr)
    assert drift("sgd", "sgd", kind, rates, buffer=buffer, **given) < EXACT
    assert drift("sgd", "sgd", kind, rates, **given) > 0.1


@pytest.mark.parametrize("kind", ["bn", "ln"])
def test_shrinking_by_lr_times_decay_is_wrong_under_momentum(kind):
    a = 1 - ALPHA_LR * ALPHA_DECAY
    rates = ALPHA_LR * a ** -(2 * np.arange(STEPS) + 1.0)
    assert drift("sgd", "sgd", kind, rates, ALPHA_LR, ALPHA_DECAY, momentum=MOMENTUM) > 0.1


@pytest.mark.parametrize("kind", ["bn", "ln"])
def test_nesterov_has_no_equivalent_by_learning_rates(kind):
    with pytest.raises(OutOfRangeError, match="nesterov=True has no exact equivalent"):
        without_weight_decay("sgd", lr=0.1, weight_decay=0.01, steps=9, momentum=0.9, nesterov=True)
    heavy = without_weight_decay(
        "sgd", lr=ALPHA_LR, weight_decay=ALPHA_DECAY, steps=STEPS, momentum=MOMENTUM
    ).lr
    a, b, shrinkage = 1.0, 0.0, [1.0]
    for _ in range(STEPS):  # what torch's Nesterov makes of the weight 1
        b = MOMENTUM * b + ALPHA_DECAY * a
        a -= ALPHA_LR * (ALPHA_DECAY * a + MOMENTUM * b)
        shrinkage.append(a)
    own = ALPHA_LR / (np.array(shrinkage[1:]) * np.array(shrinkage[:-1]))
    for rates in (heavy, own):
        hyper = {"momentum": MOMENTUM, "nesterov": True}
        assert drift("sgd", "sgd", kind, rates, ALPHA_LR, ALPHA_DECAY, **hyper) > 1e-3


@pytest.mark.parametrize("kind", ["bn", "ln"])
@pytest.mark.parametrize("powers", [1, 2])
def test_adam_without_scaled_gradients_is_not_exact(kind, powers):
    free = without_weight_decay("adamw", lr=3e-3, weight_decay=2.0, steps=STEPS)
    rates = free.lr if powers == 1 else free.lr * free.grad_scale
    assert drift("adamw", "adamw", kind, rates, 3e-3, 2.0, betas=(0.9, 0.95)) > 1e-3


def test_adam_with_l2_is_refused():
    with pytest.raises(OutOfRangeError, match="its L2 term enters the second moment"):
        without_weight_decay("adam", lr=0.1, weight_decay=0.01, steps=9)


@pytest.mark.parametrize("shape", SHAPES)
def test_sphere_sgd_follows_sgd_with_decay_on_matrices(shape):
    rates, decay = 0.1 * SHAPES[shape], 0.05
    model, spheres = network("ln")
    starts = [dict(model.named_parameters())[n].detach().clone() for n in spheres]
    original = list(train("sgd", "ln", rates, constant(decay)))
    gradients = logged_gradients(starts, original, rates, decay)
    named = dict(model.named_parameters())
    invariant = [named[n] for n in spheres]
    groups, schedules = [], []
    for n, start, grads in zip(spheres, starts, gradients, strict=True):
        norm0 = start.norm().item()
        unit_lr = sphere_sgd_lr(lr=rates, weight_decay=decay, norm0=norm0, grad_norm=grads)
        schedules.append(unit_lr * norm0**2)
        groups.append({"params": [named[n]], "sphere": "tensor"})
    optimizer = so.SphereSGD(groups, lr=1.0, move="retract")
    others = torch.optim.SGD([p for n, p in named.items() if n not in spheres], lr=0.05)
    for t, (x, y) in enumerate(batches(STEPS)):
        for group, rate in zip(optimizer.param_groups, schedules, strict=True):
            group["lr"] = rate[t]
        optimizer.zero_grad()
        others.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        others.step()
        assert apart([invariant], [original[t]], "ln") < EXACT


def logged_gradients(starts, run, rates, decay):
    """Return |g| |w| of every matrix at every step, from the steps of SGD."""
    befores = [starts, *run[:-1]]
    return np.array(
        [
            [
                ((1 - lr * decay) * w - v).norm().item() / lr * w.norm().item()
                for w, v in zip(before, after, strict=True)
            ]
            for before, after, lr in zip(befores, run, rates, strict=True)
        ]
    ).T


class Rows(nn.Module):
    """A layer of eight filters, each a parameter of its own, before BatchNorm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        sizes = torch.linspace(0.3, 2.0, 8)  # each row has a learning rate of its own
        self.rows = nn.ParameterList([nn.Parameter(s * torch.randn(64)) for s in sizes])
        self.norm, self.head = nn.BatchNorm1d(8, eps=1e-30), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(x @ torch.stack(tuple(self.rows)).T)))


def test_sphere_sgd_follows_sgd_with_decay_on_rows_before_batchnorm():
    rates, decay = 0.1 * SHAPES["warm-up and cosine"], 0.05
    model, twin = Rows().double(), Rows().double()
    sgd = torch.optim.SGD(model.rows, lr=1.0, weight_decay=decay)
    ours = so.SphereSGD([{"params": [p], "sphere": "tensor"} for p in twin.rows], move="retract")
    heads = torch.optim.SGD([*model.head.parameters(), *twin.head.parameters()], lr=0.05)
    radii = [p.norm().item() for p in twin.rows]
    grads = [[] for _ in radii]
    for t, (x, y) in enumerate(batches(STEPS)):
        for net in (model, twin):
            net.zero_grad()
            functional.cross_entropy(net(x), y).backward()
        for q, group, r, log in zip(twin.rows, ours.param_groups, radii, grads, strict=True):
            log.append(q.grad.norm().item() * r)
            rate = sphere_sgd_lr(lr=rates[: t + 1], weight_decay=decay, norm0=r, grad_norm=log)
            group["lr"] = rate[-1] * r**2
        sgd.param_groups[0]["lr"] = rates[t]
        sgd.step()
        ours.step()
        heads.step()
        worst = max(
            (p / p.norm() - q / q.norm()).norm().item()
            for p, q in zip(model.rows, twin.rows, strict=True)
        )
        assert worst < EXACT


@pytest.mark.parametrize("kind", ["bn", "ln"])
@pytest.mark.parametrize(
    ("name", "lr", "decay", "hyper"),
    [*CASES, ("adam", 3e-3, 0.05, {"betas": (0.9, 0.95), "eps": 1e-4})],
    ids=[*NAMES, "adam"],
)
def test_larger_weights_with_rescaled_settings_visit_the_same_directions(
    kind, name, lr, decay, hyper
):
    # Newton-Schulz runs in bfloat16, where only a power of two changes no rounding.
    factor = 4.0 if name == "muon" else 3.0
    other = rescaled(name, factor, lr=lr, weight_decay=decay, **hyper)
    shape = SHAPES["warm-up and cosine"]
    original = train(name, kind, lr * shape, constant(decay), **hyper)
    scaled = train(
        name, kind, other.lr * shape, constant(other.weight_decay), weights=factor, **other.hyper
    )
    assert apart(original, scaled, kind) < EXACT


def test_rescaling_with_another_optimizers_powers_is_not_exact():
    wrong = rescaled("sgd", 3.0, lr=3e-3, weight_decay=2.0)
    original = train("adamw", "ln", constant(3e-3), constant(2.0))
    scaled = train("adamw", "ln", constant(wrong.lr), constant(wrong.weight_decay), weights=3.0)
    assert apart(original, scaled, "ln") > 0.1


def test_adamc_keeps_the_norm_and_makes_the_angle_proportional_to_lr():
    rate = schedule("cosine", 3e-3, 4000, final=0.1)
    decay = adamc(rate, 0.3)
    settled = math.sqrt(3e-3 / (2 * 0.3))
    run = trajectory("adamw", lr=rate, weight_decay=decay, rms0=settled, betas=(0.9, 0.99))
    # Both to the order of lr*decay/(1-beta1), which is 0.9 % at the peak.
    np.testing.assert_allclose(run.rms, settled, rtol=0.01)
    share = run.angle[200:] / rate[200:]
    np.testing.assert_allclose(share, share[0], rtol=0.02)
    plain = trajectory("adamw", lr=rate, weight_decay=0.3, rms0=settled, betas=(0.9, 0.99))
    assert plain.rms[-1] < 0.8 * settled


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.1, "weight_decay": 0.1}, "steps=None must be given, and lr, weight_decay be"),
        ({"lr": [0.1, 0.1], "weight_decay": [0.1]}, "they say 1 and 2"),
        ({"lr": -0.1, "weight_decay": 0.1, "steps": 3}, "lr=-0.1 must be finite and not neg"),
        ({"lr": 0.1, "weight_decay": math.nan, "steps": 3}, "weight_decay=nan must be finite"),
        ({"lr": 1.0, "weight_decay": 1.5, "steps": 3}, "turns the weights round at step 0"),
        ({"lr": 0.1, "weight_decay": 0.1, "steps": 3, "dtype": "int8"}, "dtype='int8' must be one"),
        ({"lr": 0.1, "weight_decay": 0.1, "steps": 9000}, "too many for float32: .* at step 4413"),
    ],
)
def test_what_cannot_be_converted_is_named(given, message):
    with pytest.raises(OutOfRangeError, match=message):
        without_weight_decay("sgd", **given)


def test_doubles_hold_a_longer_run_than_floats():
    given = {"lr": 0.1, "weight_decay": 0.1, "steps": 9000}
    free = without_weight_decay("sgd", dtype="float64", **given)
    assert np.all(np.isfinite(free.lr))
    assert free.shrinkage[-1] < 1e-38


def test_momentum_that_oscillates_turns_weights_round():
    with pytest.raises(OutOfRangeError, match="turns the weights round at step"):
        without_weight_decay("sgd", lr=0.1, weight_decay=1.0, steps=99, momentum=0.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rescaled("adamw", 0.0, lr=0.1, weight_decay=0.1), "factor=0.0 must be positive"),
        (lambda: adamc([0.0, 0.0], 0.1), "lr=0.0 must be positive at some step"),
        (
            lambda: adamc(0.1, 0.1),
            "steps=None must be given, and lr be constants or of that length: they say nothing",
        ),
        (
            lambda: sphere_sgd_lr(lr=[0.1] * 3, weight_decay=0.5, norm0=1.0, grad_norm=[1.0] * 2),
            "lr, weight_decay, grad_norm be constants .*: they say 2 and 3",
        ),
        (
            lambda: sphere_sgd_lr(lr=2.0, weight_decay=0.5, norm0=1.0, grad_norm=[1.0]),
            "lr=2.0 times weight_decay=0.5 must be below 1",
        ),
        (
            lambda: sphere_sgd_lr(lr=1.0, weight_decay=0.5, norm0=0.0, grad_norm=[1.0]),
            "norm0=0.0 must be positive",
        ),
    ],
)
def test_values_out_of_range_are_named(call, message):
    with pytest.raises(OutOfRangeError, match=message):
        call()


def test_the_networks_of_this_file_are_exactly_invariant_and_learn():
    for kind in ("bn", "ln"):
        model, spheres = network(kind)
        x, _ = next(batches(1))
        assert so.find_spheres(model, x).spheres == spheres
        first = next(iter(train("sgd", kind, [0.0], [0.0])))
        last = list(train("sgd", kind, constant(0.1), constant(0.0)))[-1]
        assert apart([first], [last], kind) > 0.2
        assert all(u.isfinite().all() for u in unit(last, kind))


def test_the_optimizers_of_this_file_are_the_real_ones():
    w = [nn.Parameter(torch.ones(2, 2))]
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    for name, kind in (kinds | {"muon": torch.optim.Muon, "lion": so.SphereLion}).items():
        assert type(make(name, w, lr=0.1, weight_decay=0.1)) is kind
