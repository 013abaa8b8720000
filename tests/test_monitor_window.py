"""Diffusive angles from samples: what they cost, what they see, what they say."""

import math

import pytest
import torch
from torch import nn

import sphereopt as so
from sphereopt.monitor.window import Window, diffusive_angle

SHAPES = [(64, 3, 7, 7), *[(64, 64, 3, 3)] * 4, *[(256, 256, 3, 3)] * 3, *[(512, 512, 3, 3)] * 3]


@pytest.mark.parametrize("sphere", ["row", "col", "tensor", "block:8"])
def test_samples_are_below_a_hundredth_of_the_model(sphere):
    window = Window(10)
    weights = [torch.randn(shape) for shape in SHAPES]
    for i, w in enumerate(weights):
        assert window.turned(str(i), [w], sphere, 1) is None
    kept = sum(x.numel() for sample in window._samples.values() for x in sample.weights)
    assert 0.002 < kept / sum(w.numel() for w in weights) < 0.01


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sphere", ["row", "tensor", "block:4", "col"])
def test_samples_see_all_parts_of_a_kernel(sphere, layout):
    """A regular stride of a multiple of nine would see one corner of every 3x3 kernel."""
    place = torch.arange(9.0).reshape(1, 1, 3, 3)
    w = place.expand(256, 252, 3, 3).contiguous(memory_format=layout)
    window = Window(1)
    window.turned("w", [w], sphere, 1)
    (sample,) = window._samples["w"].weights
    assert set(sample.flatten().tolist()) == set(range(9))
    assert torch.bincount(sample.flatten().long()).min() > 0.5 * sample.numel() / 9


@pytest.mark.parametrize("sphere", ["row", "tensor"])
def test_angles_of_samples_are_those_of_the_whole(sphere):
    torch.manual_seed(0)
    w = torch.randn(256, 1024)
    new = w + 0.1 * torch.randn(256, 1024)
    window = Window(5)
    window.turned("w", [w], sphere, 10)
    assert not window.due("w", 14)
    assert window.due("w", 15)
    got = window.turned("w", [new], sphere, 35).square().mean().sqrt()
    want = so.geometry.angle(w, new, sphere).square().mean().sqrt() / 5
    # About a thousand of 262,144 weights: sqrt(4/1000)/2 = 3 %.
    assert float(got) == pytest.approx(float(want), rel=0.07)


def test_sixty_four_weights_tell_the_angle_of_one_sphere_to_an_eighth():
    """Both the way and the norm are sampled: sqrt(4/64)/2. Of a hundred spheres a tenth of that."""
    torch.manual_seed(0)
    w = torch.randn(4000, 1024, dtype=torch.float64)
    new = w + 0.05 * torch.randn_like(w)
    sampled = so.geometry.angle(w[:, :64], new[:, :64], "row")
    off = (sampled / so.geometry.angle(w, new, "row") - 1).reshape(40, 100)
    # Of 4,000 spheres and of 40 means: a deviation is known to 1 % and to 11 %.
    assert float(off.std()) == pytest.approx(0.125, rel=0.05)
    assert float(off.mean(1).std()) == pytest.approx(0.0125, rel=0.33)


def test_small_joint_and_partial_spheres_are_sampled_whole():
    w, b = torch.randn(6, 4), torch.randn(6)
    window = Window(1)
    window.turned("joint", [w, b], "row", 1)
    (sample,) = window._samples["joint"].weights
    assert torch.equal(sample.sort(1).values, torch.cat([w, b[:, None]], 1).sort(1).values)
    window.turned("parts", [w], "block:2@0:4,row@5:6", 1)
    assert [tuple(x.shape) for x in window._samples["parts"].weights] == [(2, 8), (1, 4)]


def test_the_way_of_many_steps_has_its_closed_form():
    turned = torch.tensor([1e-9, 0.3, 1.5], dtype=torch.float64)
    want = [math.sqrt(-2 * math.log(math.cos(x)) / 50) for x in (0.3, 1.5)]
    got = diffusive_angle(turned, 50).tolist()
    assert got == pytest.approx([1e-9 / math.sqrt(50), *want], rel=1e-9)
    for steps in (1, 900):
        k = so.theory.K_from_angles(0.01, 0.3, steps)
        got = diffusive_angle(torch.tensor(0.3, dtype=torch.float64), steps) / 0.01
        assert float(got) ** 2 == pytest.approx(k, rel=1e-12)
    assert not torch.isfinite(diffusive_angle(torch.tensor([math.pi / 2 + 1e-3, 3.0]), 10)).any()


def test_the_window_is_off_when_asked():
    w = nn.Parameter(torch.randn(4, 8))
    optimizer, rows = so.SphereSGD([("w", w)], lr=0.1, sphere="row"), []
    with so.track(optimizer, rows.append, window=0):
        for _ in range(3):
            w.grad = torch.randn(4, 8)
            optimizer.step()
    assert not any("diffusive_angle" in row["parameters"]["w"] for row in rows)
    with pytest.raises(ValueError, match=r"window=-1 must be 0 \(off\) or a number of steps"):
        so.track(optimizer, rows.append, window=-1)
