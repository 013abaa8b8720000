"""``fgsm`` and ``pgd`` against Foolbox, closed forms and what they must not touch."""

import functools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sphereopt.diagnostics import fgsm, pgd

EPS = {"linf": 0.05, "l2": 0.5}


def images(n=12, dtype=torch.float32):
    return torch.rand(n, 2, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)


def labels(n=12):
    return torch.arange(n) % 4


def convnet():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 4),
    ).eval()  # fmt: skip


def linear():
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 4)).eval()


@functools.cache
def foolbox():
    with warnings.catch_warnings():
        # It and its eagerpy import what newer setuptools and numpy deprecate.
        warnings.simplefilter("ignore")
        return pytest.importorskip("foolbox")


@pytest.mark.parametrize("make", [linear, convnet])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-9.0, 9.0)])
def test_the_iterates_are_foolboxs(make, norm, steps, bounds):
    fb, model, x, y = foolbox(), make(), images(), labels()
    eps, step = EPS[norm], EPS[norm] / 4
    kind = {
        "linf": fb.attacks.LinfProjectedGradientDescentAttack,
        "l2": fb.attacks.L2ProjectedGradientDescentAttack,
    }[norm]
    theirs = kind(abs_stepsize=step, steps=steps, random_start=False)
    expected = theirs.run(fb.PyTorchModel(model, bounds, "cpu"), x, y, epsilon=eps)
    ours = pgd(model, x, y, eps, steps, step, norm=norm, random_start=False, clip=bounds)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert (ours - x).abs().max() > EPS["linf"] / 100


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_foolboxs_fast_gradient(norm):
    fb, model, x, y = foolbox(), convnet(), images(), labels()
    kind = {"linf": fb.attacks.LinfFastGradientAttack, "l2": fb.attacks.L2FastGradientAttack}[norm]
    expected = kind(random_start=False).run(
        fb.PyTorchModel(model, (0, 1), "cpu"), x, y, epsilon=EPS[norm]
    )
    ours = fgsm(model, x, y, EPS[norm], norm=norm)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_targeted_iterates_are_foolboxs():
    fb, model, x, goal = foolbox(), convnet(), images(), (labels() + 1) % 4
    theirs = fb.attacks.LinfProjectedGradientDescentAttack(
        abs_stepsize=0.01, steps=10, random_start=False
    )
    criterion = fb.criteria.TargetedMisclassification(goal)
    expected = theirs.run(fb.PyTorchModel(model, (0, 1), "cpu"), x, criterion, epsilon=0.05)
    ours = pgd(model, x, goal, 0.05, 10, 0.01, random_start=False, targeted=True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert cross_entropy(model(ours), goal) < cross_entropy(model(x), goal)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_best_attack_on_a_binary_linear_classifier_is_found_exactly(norm):
    w = torch.randn(6, dtype=torch.float64)
    model = nn.Linear(6, 1, dtype=torch.float64)
    model.weight.data[:] = w
    x = torch.randn(5, 6, dtype=torch.float64)
    y = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)

    def loss(out, y):
        return nn.functional.binary_cross_entropy_with_logits(out[:, 0], y, reduction="sum")

    away = (1 - 2 * y)[:, None] * (w.sign() if norm == "linf" else w / w.norm())
    options = {"norm": norm, "loss": loss, "clip": None}
    for found in (
        fgsm(model, x, y, 0.3, **options),
        pgd(model, x, y, 0.3, 7, random_start=False, **options),
        # From anywhere in the cube, steps that add up to its width end at the best corner.
        pgd(model, x, y, 0.3, 7, 0.1, **options) if norm == "linf" else x + 0.3 * away,
    ):
        torch.testing.assert_close(found, x + 0.3 * away, rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [True, False])
def test_every_iterate_is_in_the_ball_and_in_the_box(norm, random_start):
    seen, model, x = [], convnet(), images()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    eps = torch.linspace(0.0, 0.4, 12)
    seen.append(pgd(model, x, labels(), eps, 8, 0.2, norm=norm, random_start=random_start))
    assert len(seen) == 9
    for iterate in seen:
        assert iterate.min() >= 0
        assert iterate.max() <= 1
        size = (iterate - x).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)
        # x + delta - x in float32, up to 1/16 of whose values' spacing adds up in the 2-norm.
        assert (size <= eps + 1e-6).all()
    assert torch.equal(seen[-1][0], x[0])  # eps 0
    assert (seen[-1][1:] != x[1:]).flatten(1).any(1).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball(norm):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), torch.zeros(4000, 2)
    model[1].weight.data.zero_()
    start = pgd(model, x, torch.zeros(4000, dtype=torch.long), 1.0, 1, norm=norm, clip=None)
    # A gradient of zero stays put: what comes back is the start. Uniform: the share within a
    # radius r is r^2 in two dims; four standard deviations of 4000 draws.
    size = start.norm(dim=1, p=math.inf if norm == "linf" else 2)
    for radius in (0.3, 0.5, 0.8):
        share = (size <= radius).float().mean().item()
        error = math.sqrt(radius**2 * (1 - radius**2) / 4000)
        assert share == pytest.approx(radius**2, abs=4 * error)
    assert size.max() <= 1 + 1e-6
    assert start.mean(0).norm() < 0.05


def test_generators_decide_the_start_and_without_one_calls_agree():
    model, x, y = convnet(), images(), labels()
    state = torch.get_rng_state()
    first = pgd(model, x, y, 0.1, 2)
    assert torch.equal(first, pgd(model, x, y, 0.1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    runs = [
        pgd(model, x, y, 0.1, 2, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_zero_gradient_moves_nothing_and_is_no_nan(norm):
    model, x = linear(), images()
    model[1].weight.data.zero_()
    assert torch.equal(pgd(model, x, labels(), 0.3, 5, norm=norm, random_start=False), x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_whose_square_underflows_is_followed_as_any_other(norm):
    model, x = linear(), images()
    options = {"norm": norm, "clip": None}

    def loss(out, y, size=1.0):
        return out[:, 0].sum() * size

    tiny = fgsm(model, x, labels(), 0.1, loss=lambda out, y: loss(out, y, 1e-30), **options)
    torch.testing.assert_close(tiny, fgsm(model, x, labels(), 0.1, loss=loss, **options))
    assert not torch.equal(tiny, x)


def linear_like(model):
    twin = linear()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_half_precision_attacks_as_float32_does_up_to_its_rounding(dtype, norm):
    model, x, y = linear(), images(dtype=dtype), labels()
    options = {"norm": norm, "random_start": False}
    wide = pgd(model, x.float(), y, EPS[norm], 4, **options)
    half = pgd(linear_like(model).to(dtype), x, y, EPS[norm], 4, **options)
    assert half.dtype == dtype
    spacing = torch.finfo(dtype).eps
    moved = (half.float() - x.float()).flatten(1)
    if norm == "linf":
        assert moved.abs().max() <= EPS[norm] + spacing / 2
    else:
        assert (moved.norm(dim=1) <= EPS[norm] + spacing / 2 * x[0].numel() ** 0.5).all()
    # Nearly zero entries of a gradient may change sign.
    cosine = nn.functional.cosine_similarity(moved, (wide - x.float()).flatten(1))
    assert cosine.min() > 0.95
    assert torch.equal(pgd(linear_like(model).to(dtype), x, y, 0.0, 4, norm=norm), x)


def test_samples_do_not_influence_each_other():
    model, x, y = convnet(), images(), labels()
    whole = pgd(model, x, y, 0.1, 5, random_start=False, norm="l2")
    alone = torch.cat(
        [pgd(model, x[i : i + 1], y[i : i + 1], 0.1, 5, random_start=False, norm="l2")
         for i in range(len(x))]
    )  # fmt: skip
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_found(fail):
    model, x, y = convnet().train(), images(), labels()
    x.requires_grad_()
    cross_entropy(model(x), y).backward()
    model[3].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [(p.grad, p.grad.clone()) for p in [x, *model.parameters()]]
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()

    def loss(out, y):
        if fail:
            raise ArithmeticError
        return cross_entropy(out, y)

    if fail:
        with pytest.raises(ArithmeticError):
            pgd(model, x, y, 0.1, 3, loss=loss)
    else:
        found = pgd(model, x, y, 0.1, 3, loss=loss)
        assert not found.requires_grad
        assert not torch.equal(found, x)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    for p, (grad, value) in zip([x, *model.parameters()], grads, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)


def test_models_that_begin_in_place_and_frozen_models_under_no_grad_are_attacked():
    model = nn.Sequential(nn.ReLU(inplace=True), *convnet()).eval().requires_grad_(False)
    x, y = images(), labels()
    with torch.no_grad():
        found = fgsm(model, x, y, 0.1)
        assert cross_entropy(model(found), y) > cross_entropy(model(images()), y)
    assert torch.equal(x, images())


def test_bad_arguments_are_named():
    model, x, y = linear(), images(), labels()
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        fgsm(model, x.long(), y, 0.1)
    with pytest.raises(ValueError, match=r"outside clip=\(0\.0, 0\.5\)"):
        fgsm(model, x, y, 0.1, clip=(0.0, 0.5))
    with pytest.raises(ValueError, match="norm='l1'"):
        fgsm(model, x, y, 0.1, norm="l1")
    with pytest.raises(ValueError, match="steps=0"):
        pgd(model, x, y, 0.1, 0)
    with pytest.raises(ValueError, match=r"eps=-0\.1"):
        fgsm(model, x, y, -0.1)
    with pytest.raises(ValueError, match=r"step_size has shape \(3,\)"):
        pgd(model, x, y, 0.1, 2, torch.ones(3))

    class Several(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match="returned a tuple; pass loss="):
        fgsm(Several(), x, y, 0.1)
