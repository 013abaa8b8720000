"""From live torch optimizers to what ours should be given."""

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

import sphereopt as so
from sphereopt.geometry import angle
from sphereopt.theory import OutOfRangeError, equilibrium, schedule, sphere_lr


class Lion(torch.optim.Optimizer):
    """What packages of Lion look like from outside."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})


def network(width=64, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(64, width, bias=False), nn.LayerNorm(width, eps=1e-12), nn.Tanh()]
    layers += [nn.Linear(width, width, bias=False), nn.LayerNorm(width, eps=1e-12), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 10)).double()


def batches(steps, size=8):
    """Yield digits with a third of their labels drawn anew, so that gradients stay noisy."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16.0), torch.tensor(labels)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        at = torch.randint(len(images), (size,), generator=generator)
        wrong = torch.rand(size, generator=generator) < 0.35
        other = torch.randint(10, (size,), generator=generator)
        yield images[at], torch.where(wrong, other, labels[at])


def turned(model, optimizer, scheduler, steps, weights):
    """Train; return the angle of every step of every weight."""
    angles = []
    for images, labels in batches(steps):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        before = [w.detach().clone() for w in weights]
        optimizer.step()
        scheduler.step()
        pairs = zip(before, weights, strict=True)
        angles.append([angle(old, w.detach(), "tensor").item() for old, w in pairs])
    return np.array(angles)


@pytest.mark.parametrize(
    ("build", "name", "hyper", "ours"),
    [
        (torch.optim.AdamW, "adamw", {"betas": (0.8, 0.95)}, "SphereAdam"),
        (torch.optim.SGD, "sgd", {"momentum": 0.9}, "SphereSGD"),
        (torch.optim.SGD, "sgd", {"momentum": 0.9, "nesterov": True}, "SphereSGD"),
        (torch.optim.SGD, "sgd", {"momentum": 0.9, "dampening": 0.5}, "SphereSGD"),
        (Lion, "lion", {"betas": (0.9, 0.98)}, "SphereLion"),
    ],
)
def test_without_steps_it_is_the_equilibrium_and_ours_takes_it(build, name, hyper, ours):
    weight = nn.Parameter(torch.randn(8, 16))
    gain = nn.Parameter(torch.ones(8))
    groups = [{"params": [gain], "weight_decay": 0.0}, {"params": [weight]}]
    optimizer = build(groups, lr=1e-2, weight_decay=0.01, **hyper)
    (found,) = sphere_lr(optimizer)
    assert (found.group, found.optimizer, found.angles) == (1, ours, None)
    expected = equilibrium(name, lr=1e-2, weight_decay=0.01, **hyper).angle
    assert found.lr == pytest.approx(expected, rel=1e-12)
    assert found.factor(10) == 1
    made = getattr(so, ours)([{"params": [weight], "sphere": "row"}], lr=found.lr, **found.hyper)
    assert made.param_groups[0]["move"] == "rotate"


def test_adamw_in_the_dress_of_adam_is_adamw():
    weight = nn.Parameter(torch.randn(8, 16))
    options = {"lr": 1e-3, "weight_decay": 0.1}
    plain = torch.optim.Adam([weight], decoupled_weight_decay=True, **options)
    assert sphere_lr(plain)[0].lr == sphere_lr(torch.optim.AdamW([weight], **options))[0].lr


def test_muon_s_angle_is_that_of_its_matrices():
    shapes = [(16, 16), (64, 16)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.Muon(weights, lr=1e-2, weight_decay=0.1)
    angles = [equilibrium("muon", lr=1e-2, weight_decay=0.1, shape=s).angle for s in shapes]
    assert angles[0] != angles[1]
    expected = math.sqrt((angles[0] ** 2 + angles[1] ** 2) / 2)
    assert sphere_lr(optimizer)[0].lr == pytest.approx(expected, rel=1e-12)


def test_l2_under_adam_takes_the_gradients_it_finds():
    weight = nn.Parameter(torch.randn(8, 16))
    optimizer = torch.optim.Adam([weight], lr=1e-3, weight_decay=0.01)
    with pytest.raises(OutOfRangeError, match="grad_norm"):
        sphere_lr(optimizer)
    weight.grad = torch.randn(8, 16)
    size = weight.grad.norm().item() * weight.detach().norm().item()
    expected = equilibrium("adam", lr=1e-3, weight_decay=0.01, dim=128, grad_norm=size).angle
    assert sphere_lr(optimizer)[0].lr == pytest.approx(expected, rel=1e-6)  # norms are float32


def test_adamw_turns_as_foreseen_and_sphere_adam_in_its_place():
    steps, options = 400, {"betas": (0.9, 0.95)}
    lr = schedule("cosine", 3e-3, steps, warmup=40, final=0.1)
    model = network()
    weights = [model[0].weight, model[3].weight]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.3}, {"params": model[6].parameters()}],
        lr=1.0,
        weight_decay=0.0,
        **options,
    )
    scheduler = LambdaLR(optimizer, lambda step: lr[min(step, steps - 1)])
    found = sphere_lr(optimizer, scheduler, steps=steps)
    twin = copy.deepcopy(model)
    measured = np.sqrt(np.mean(turned(model, optimizer, scheduler, steps, weights) ** 2, axis=1))
    # Windows of 40 steps, since successive updates are alike over 10. At the start gradients are
    # not yet noise, and turn the weights 17 % faster; later windows are within 9.4 %.
    windows = measured.reshape(-1, 40).mean(axis=1)
    foreseen = found[0].angles.reshape(-1, 40).mean(axis=1)
    assert windows[0] == pytest.approx(foreseen[0], rel=0.2)
    assert windows[1:] == pytest.approx(foreseen[1:], rel=0.1)

    held = [twin[0].weight, twin[3].weight]
    ours = so.SphereAdam(
        [{"params": held, "sphere": "tensor"}, {"params": twin[6].parameters(), "lr": 0.0}],
        lr=found[0].lr,
        **found[0].hyper,
    )
    ahead = LambdaLR(ours, [found[0].factor, lambda step: 1.0])
    again = turned(twin, ours, ahead, steps, held)
    # rotate turns by lr; what is left is the rounding of float64 at 1e-3 rad.
    assert again == pytest.approx(np.stack([found[0].angles] * 2, axis=1), rel=1e-9)


def test_sgd_turns_as_foreseen():
    steps = 300
    lr = schedule("cosine", 0.3, steps, warmup=20, final=0.1)
    model = network(width=32)
    weights = [model[0].weight, model[3].weight]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 0.01}, {"params": model[6].parameters(), "lr": 0.01}],
        lr=1.0,
        momentum=0.9,
    )
    scheduler = LambdaLR(optimizer, [lambda step: lr[min(step, steps - 1)], lambda step: 1.0])
    with pytest.raises(OutOfRangeError, match=r"without gradients: call backward\(\)"):
        sphere_lr(optimizer, scheduler, steps=steps)
    images, labels = next(batches(1, size=256))
    cross_entropy(model(images), labels).backward()
    found = sphere_lr(optimizer, scheduler, steps=steps)
    measured = np.sqrt(np.mean(turned(model, optimizer, scheduler, steps, weights) ** 2, axis=1))
    # One batch's gradient at the start stands for the run, so this is looser; without following
    # the norms (the equilibrium angle) it would be off by a factor.
    ratio = found[0].angles[40:].mean() / measured[40:].mean()
    assert ratio == pytest.approx(1, abs=0.25)


def test_neither_optimizer_nor_scheduler_is_touched():
    model = network(width=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=50)
    kept = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    clock = scheduler.last_epoch, scheduler.get_last_lr()
    (found,) = sphere_lr(optimizer, scheduler, steps=50)
    assert str((optimizer.state_dict(), model.state_dict())) == str(kept)
    assert (scheduler.last_epoch, scheduler.get_last_lr()) == clock
    assert any("betas changes with the schedule" in text for text in found.warnings)
    assert np.argmax(found.angles) > 5  # the cycle's peak, not its start


def test_parameters_that_cannot_be_on_a_sphere_are_left_out():
    zero, frozen = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.randn(4, 4), False)
    rest = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.tensor(1.0)), zero, frozen]
    rest.append(nn.Parameter(torch.empty(0, 3)))
    optimizer = torch.optim.AdamW(rest, lr=1e-3)
    with pytest.raises(OutOfRangeError, match="no matrix or filter"):
        sphere_lr(optimizer)


@pytest.mark.parametrize(
    ("build", "call", "message"),
    [
        (torch.optim.Adagrad, {}, "optimizer='Adagrad' must be one of Adam, AdamW, Lion, Muon"),
        (so.SphereSGD, {}, "optimizer='SphereSGD' must be one of"),
        (torch.optim.SGD, {}, "steps=None must be given: with lr=0.1 and weight_decay=0 nothing"),
        (torch.optim.SGD, {"steps": 0}, "steps=0 must be a whole number, 1 or more"),
    ],
)
def test_what_cannot_be_answered_is_refused(build, call, message):
    weight = nn.Parameter(torch.randn(8, 16))
    weight.grad = torch.randn(8, 16)
    with pytest.raises(OutOfRangeError, match=message):
        sphere_lr(build([weight], lr=0.1), **call)


def test_schedulers_need_steps_and_metrics_cannot_be_foreseen():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.randn(8, 16))], lr=0.1)
    with pytest.raises(OutOfRangeError, match="steps=None must be given with a scheduler"):
        sphere_lr(optimizer, LambdaLR(optimizer, lambda step: 1.0))
    with pytest.raises(OutOfRangeError, match="follows a metric"):
        sphere_lr(optimizer, ReduceLROnPlateau(optimizer), steps=10)


def test_amsgrad_is_said_to_be_taken_for_adam():
    weight = nn.Parameter(torch.randn(8, 16))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, amsgrad=True)
    assert "amsgrad" in str(sphere_lr(optimizer)[0])
