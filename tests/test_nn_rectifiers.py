"""The scaled ReLU against quadrature of its definition."""

import math

import numpy as np
import pytest
import torch

from sphereopt.nn.rectifiers import ScaledReLU, TranslatedReLU, scaled_relu


def test_standard_normal_input_gives_mean_zero_and_variance_one():
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    half = torch.linspace(-12, 12, 480_001, dtype=torch.float64)  # trapezoids: the kink is a node
    density = torch.exp(-half.square() / 2) / math.sqrt(2 * math.pi)
    y = scaled_relu(half)
    assert abs(torch.trapezoid(y * density, half)) < 1e-9
    assert abs(torch.trapezoid(y.square() * density, half) - 1) < 1e-9
    # The same by another rule, to what the kink allows it.
    gauss = scaled_relu(torch.from_numpy(nodes)).square().numpy() @ weights / math.sqrt(2 * math.pi)
    assert abs(gauss - 1) < 1e-2


def test_both_papers_write_the_same_function():
    x = torch.randn(1000, dtype=torch.float64)
    translated = (x.relu() - 1 / math.sqrt(2 * math.pi)) / math.sqrt(0.5 * (1 - 1 / math.pi))
    assert (ScaledReLU()(x) - translated).abs().max() < 1e-15
    assert TranslatedReLU is ScaledReLU


def test_gradients():
    x = torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scaled_relu, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_stays(dtype):
    assert scaled_relu(torch.ones(3, dtype=dtype)).dtype == dtype
