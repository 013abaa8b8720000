"""Standardization as a map onto a sphere: the lemma, with numpy and autograd as judges."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sphereopt.nn import sphere_map as sm

DTYPE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE) * 3 + 1


def by_numpy(x, axes, eps):
    x = x.numpy()
    mean = x.mean(axes, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + eps)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 10.0])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((7,), 0), ((4, 7), -1), ((4, 7), 0), ((2, 3, 4, 5), (0, 2, 3)), ((2, 3, 4), (1, 2))],
)
def test_it_is_the_definition_over_any_dims(shape, dim, eps):
    x = draw(*shape)
    expected = by_numpy(x, dim, eps)
    assert np.abs(sm.standardize(x, dim, eps).numpy() - expected).max() < 1e-13
    radius = np.sqrt((expected**2).sum(axis=dim, keepdims=True))
    assert np.abs(sm.standardize_radius(x, dim, eps).numpy() - radius).max() < 1e-12


@pytest.mark.parametrize("name", ["batch", "layer", "instance", "group"])
def test_torchs_normalizers_are_this_map_over_their_own_dims(name):
    x = draw(4, 6, 3, 5)
    theirs, ours = {
        "batch": lambda: (
            F.batch_norm(x, None, None, training=True),
            sm.standardize(x, (0, 2, 3), 1e-5),
        ),
        "layer": lambda: (F.layer_norm(x, x.shape[1:]), sm.standardize(x, (1, 2, 3), 1e-5)),
        "instance": lambda: (F.instance_norm(x), sm.standardize(x, (2, 3), 1e-5)),
        "group": lambda: (
            F.group_norm(x, 3),
            sm.standardize(x.view(4, 3, 2, 3, 5), (2, 3, 4), 1e-5).view_as(x),
        ),
    }[name]()
    assert (theirs - ours).abs().max() < 1e-13


def test_the_image_is_the_sphere_of_radius_root_n_orthogonal_to_ones():
    y = sm.standardize(draw(5, 9))
    assert (y.norm(dim=1) - 3).abs().max() < 1e-13
    assert y.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("a", [2.0, 1e-6, -3.0])
def test_shift_and_scale_are_lost_but_for_a_sign(a):
    x = draw(5, 9)
    assert (sm.standardize(a * x + 7) - np.sign(a) * sm.standardize(x)).abs().max() < 1e-8


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_jacobian_is_that_of_autograd(eps):
    x = draw(3, 6)
    ours = sm.standardize_jacobian(x, eps)
    for row, jacobian in zip(x, ours, strict=True):
        truth = torch.autograd.functional.jacobian(lambda v: F.layer_norm(v, (6,), eps=eps), row)
        assert (jacobian - truth).abs().max() < 1e-12
        assert (jacobian - jacobian.T).abs().max() == 0


def test_jacobian_is_a_projector_over_sigma_with_two_null_directions():
    x = draw(7)
    sigma = x.std(correction=0)
    projector = sigma * sm.standardize_jacobian(x)
    assert (projector @ projector - projector).abs().max() < 1e-14
    assert torch.linalg.matrix_rank(projector) == 5
    shift, scale = sm.standardize_null(x)
    assert (projector @ torch.stack([shift, scale], 1)).abs().max() < 1e-14
    assert abs(shift @ scale) < 1e-15
    assert (torch.stack([shift.norm(), scale.norm()]) - 1).abs().max() < 1e-14


def test_with_eps_the_scale_direction_is_null_no_more():
    x, eps = draw(7), 0.5
    _, u = sm.standardize_null(x)
    s = (x.var(correction=0) + eps).sqrt()
    assert (sm.standardize_jacobian(x, eps) @ u - eps / s**3 * u).abs().max() < 1e-14


@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("dim", [-1, 0, (0, 1)])
def test_pullback_is_both_derivatives(dim, eps):
    x, g = draw(4, 6), draw(4, 6, seed=1)
    leaf = x.clone().requires_grad_()
    (backward,) = torch.autograd.grad(sm.standardize(leaf, dim, eps), leaf, g)
    _, forward = torch.func.jvp(lambda v: sm.standardize(v, dim, eps), (x,), (g,))
    ours = sm.standardize_pullback(x, g, dim, eps)
    assert (ours - backward).abs().max() < 1e-13
    assert (ours - forward).abs().max() < 1e-13


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_gradients_to_second_order(eps):
    x = draw(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: sm.standardize(v, -1, eps), x)
    assert torch.autograd.gradgradcheck(lambda v: sm.standardize(v, -1, eps), x)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_equal_numbers_become_zero_with_a_finite_gradient(eps):
    x = torch.full((2, 4), 3.0, dtype=DTYPE, requires_grad=True)
    g = draw(2, 4)
    y = sm.standardize(x, -1, eps)
    y.backward(g)
    s = np.sqrt(eps) if eps else 1.0
    assert y.abs().max() == 0
    assert (x.grad - (g - g.mean(1, keepdim=True)) / s).abs().max() < 1e-13
    jacobian = sm.standardize_jacobian(x.detach(), eps)
    assert (jacobian @ g.unsqueeze(-1) - x.grad.unsqueeze(-1)).abs().max() < 1e-12
    assert (sm.standardize_pullback(x.detach(), g, -1, eps) - x.grad).abs().max() < 1e-12
    assert sm.standardize_null(x.detach())[1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_inside_and_rounded_once(dtype):
    x = (draw(4, 2000) * 1000).to(dtype)  # squares, and norms, are far beyond float16's 65504
    exact = sm.standardize(x.double())
    # One rounding: half a unit in the last place of numbers up to 4.
    assert (sm.standardize(x).double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps
    assert sm.standardize(x).dtype == dtype


def test_memory_layout_does_not_matter():
    x = draw(2, 3, 4, 5)
    last = x.to(memory_format=torch.channels_last)
    assert torch.allclose(sm.standardize(last, (0, 2, 3)), sm.standardize(x, (0, 2, 3)), atol=1e-14)
    assert torch.allclose(sm.standardize(x.mT, -1), sm.standardize(x, 2).mT, atol=1e-14)


@pytest.mark.parametrize(
    ("x", "dim", "message"),
    [
        (torch.ones(3, 1), -1, r"dim=-1 of shape \(3, 1\) holds 1 numbers"),
        (torch.ones(3, 0), -1, "holds 0 numbers"),
        (torch.ones(3), 1, r"dim=1 does not name dims of a tensor of shape \(3,\)"),
        (torch.ones(3), (), "does not name dims"),
    ],
)
def test_dims_that_hold_no_direction_are_refused(x, dim, message):
    with pytest.raises(ValueError, match=message):
        sm.standardize(x, dim)


def test_other_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"dtype torch.int64"):
        sm.standardize(torch.arange(3))
    with pytest.raises(TypeError, match="complex64"):
        sm.standardize(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="eps=-1"):
        sm.standardize(torch.ones(3), eps=-1)
    with pytest.raises(ValueError, match=r"g has shape \(2,\) and x \(3,\)"):
        sm.standardize_pullback(torch.ones(3), torch.ones(2))
