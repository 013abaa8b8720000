"""What ``propagation`` measures, against numpy in float64 and known cases."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sphereopt.diagnostics import Layer, _measure, propagation
from sphereopt.diagnostics.findings import of_propagation

# float32 sums of a few thousand terms.
CLOSE = {"rel": 2e-5, "abs": 1e-6}


def oracle(x, channel=1):
    """Return variance, similarity and stable rank, as the paper defines them, in float64."""
    x = np.asarray(x.detach(), np.float64)
    others = tuple(d for d in range(x.ndim) if d != channel % x.ndim)
    flat = x.reshape(len(x), -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    gram = unit @ unit.T
    n = len(x)
    similarity = np.mean([(gram[i].sum() - 1) / (n - 1) for i in range(n)])
    rank = np.trace(gram) / np.linalg.norm(gram, 2)
    return x.var(axis=others).mean(), similarity, rank


def check(layer, x, channel=1):
    variance, similarity, rank = oracle(x, channel)
    assert layer.variance == pytest.approx(variance, **CLOSE)
    assert layer.similarity == pytest.approx(similarity, **CLOSE)
    assert layer.stable_rank == pytest.approx(rank, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_number_of_a_convnet_is_numpys(dtype, layout):
    conv, norm, act = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()
    head = nn.Linear(5 * 36, 4)
    model = nn.Sequential(conv, norm, act, nn.Flatten(), head).to(dtype)
    x = torch.randn(7, 3, 8, 8, dtype=dtype).to(memory_format=layout) + 1
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    found = propagation(model, x, loss=lambda out: nn.functional.cross_entropy(out, y))
    a = conv(x)
    b = norm(a)
    c = act(b)
    d = head(c.flatten(1))
    grads = torch.autograd.grad(nn.functional.cross_entropy(d, y), [a, b, c, d])
    assert [row.kind for row in found.layers] == ["Conv2d", "BatchNorm2d", "ReLU", "Linear"]
    roles = ["weights", "normalizer", "activation", "weights"]
    assert [row.role for row in found.layers] == roles
    for row, value, grad in zip(found.layers, (a, b, c, d), grads, strict=True):
        check(row, value)
        assert row.shape == tuple(value.shape)
        assert row.grad_norm == pytest.approx(np.linalg.norm(grad.double()), **CLOSE)
        assert row.lost == row.grad_lost == 0
    assert found.samples == 7
    assert found.notes == ()


def test_channels_of_tokens_are_last():
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3))
    x = torch.randn(4, 9, 6)
    found, value = propagation(model, x), x
    for row, module in zip(found.layers, model, strict=True):
        value = module(value)
        check(row, value, channel=-1)


def test_channels_after_a_1d_convolution_are_second():
    model = nn.Sequential(nn.Conv1d(6, 5, 3), nn.BatchNorm1d(5), nn.ReLU())
    x = torch.randn(4, 6, 9)
    found, value = propagation(model, x), x
    for row, module in zip(found.layers, model, strict=True):
        value = module(value)
        check(row, value)


class Hand(nn.Linear):
    """A layer that passes its input on: what is measured is what was put in."""

    def forward(self, x):
        return x + 0 * self.weight.sum()


def of(x, **options):
    (row,) = propagation(Hand(2, 2), x, **options).layers
    return row


def test_orthogonal_inputs_have_similarity_0_and_full_rank():
    row = of(torch.eye(6, 9)[:, torch.randperm(9)] * torch.arange(1.0, 7)[:, None])
    assert row.similarity == pytest.approx(0, abs=1e-6)
    assert row.stable_rank == pytest.approx(6, rel=1e-6)


@pytest.mark.parametrize("features", [3, 50])
def test_multiples_of_one_input_have_similarity_1_and_rank_1(features):
    row = of(torch.randn(1, features) * torch.rand(8, 1))
    assert row.similarity == pytest.approx(1, abs=1e-6)
    assert row.stable_rank == pytest.approx(1, rel=1e-6)


def test_opposite_inputs_have_similarity_minus_1():
    x = torch.randn(1, 5)
    assert of(torch.cat([x, -x])).similarity == pytest.approx(-1, abs=1e-6)


def test_more_samples_than_features_give_the_same_rank_by_the_smaller_gram_matrix():
    x = torch.randn(40, 7)
    check(of(x), x)


def test_a_zero_sample_has_no_direction():
    row = of(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))
    assert row.similarity == pytest.approx(2 / 6)
    assert row.stable_rank == pytest.approx(1)


def test_the_rank_is_of_the_first_samples_only():
    x = torch.randn(30, 50)
    assert of(x, gram_samples=10).stable_rank == pytest.approx(oracle(x[:10])[2], rel=1e-5)
    assert of(x, gram_samples=10).similarity == pytest.approx(oracle(x)[1], **CLOSE)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 1e38)])
def test_squares_of_large_halves_do_not_overflow(dtype, size):
    x = (torch.randn(8, 16).clamp(-1, 1) * size).to(dtype)
    row = of(x, loss=lambda out: out.float().sum() * 0)
    check(row, x.double())
    assert math.isfinite(row.variance)
    assert row.lost == 0


def test_large_gradients_do_not_overflow():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    row = of(x, loss=lambda out: (out.float() * 1e30).sum())
    assert row.grad_norm == pytest.approx(1e30 * math.sqrt(32), rel=0.01)  # bf16 has 8 bits


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-3])
def test_rounding_does_not_hide_a_constant_channel(value):
    x = torch.full((999, 4), value)
    x[:, 3] += 1e-3 * value * torch.randn(999)
    assert of(x).dead == 0.75


def test_one_sample_has_neither_similarity_nor_rank():
    row = of(torch.randn(1, 5))
    assert row.similarity is None
    assert row.stable_rank is None


def test_a_first_dim_of_several_rows_per_sample_is_split_by_sample():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(x.flatten(0, 1))

    model, x = Windows(), torch.randn(4, 3, 6)
    (row,) = propagation(model, x).layers
    expected = oracle(model.fc(x).reshape(4, -1))
    assert row.similarity == pytest.approx(expected[1], **CLOSE)


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_the_explosion_of_a_deep_linear_net_is_the_product_of_its_matrices(gain):
    layers = [nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(9)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain)
    found = propagation(nn.Sequential(*layers), torch.randn(5, 6, dtype=torch.float64))
    # The last matrix follows no pre-activation but the output; 7 lie between the 1st and the 8th.
    assert found.explosion == pytest.approx(gain**7, rel=1e-10)
    norms = [row.grad_norm for row in found.layers]
    for earlier, later in pairwise(norms):
        assert earlier / later == pytest.approx(gain, rel=1e-10)


def test_without_labels_the_loss_is_a_fixed_functional_with_mean_over_samples():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(6, 4)
    found = propagation(model, x)
    v = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert found.layers[-1].grad_norm == pytest.approx((v.norm() / 6).item(), rel=1e-6)
    assert "random linear functional" in found.notes[0]
    assert propagation(model, x) == found


def deep(norm, depth=20, width=32):
    layers = []
    for i in range(depth):
        layers += [nn.Linear(8 if i == 0 else width, width, bias=False)]
        nn.init.kaiming_normal_(layers[-1].weight)
        layers += [norm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def names(found):
    return {finding.name for finding in found.findings}


def test_a_deep_net_without_normalizer_is_found_similar_and_one_with_batchnorm_is_not():
    x = torch.rand(64, 8)
    plain = propagation(deep(lambda width: nn.Identity()), x)
    (finding,) = (f for f in plain.findings if f.name == "similar")
    assert finding.value == plain.layers[-2].similarity >= 0.9
    assert f"cosine {finding.value:.2f}" in str(finding)
    assert "slow" in finding.sentence
    assert "similar" not in names(propagation(deep(nn.BatchNorm1d), x))


def test_growth_is_found_exponential_where_it_is_and_not_where_it_is_linear():
    class Residual(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.fc, self.norm, self.act = nn.Linear(32, 32, bias=False), norm, nn.ReLU()
            nn.init.kaiming_normal_(self.fc.weight)

        def forward(self, x):
            return x + self.act(self.norm(self.fc(x)))

    x = torch.randn(64, 32)
    plain = [Residual(nn.Identity()) for _ in range(20)]
    found = propagation(nn.Sequential(*plain), x)
    (finding,) = (f for f in found.findings if f.name == "growing")
    variances = [row.variance for row in found.layers if row.role == "activation"]
    assert finding.value == pytest.approx(variances[-1] / variances[0])
    assert "exponentially" in finding.sentence
    normed = [Residual(nn.BatchNorm1d(32)) for _ in range(20)]
    assert "growing" not in names(propagation(nn.Sequential(*normed), x))
    stream = propagation(nn.Sequential(*normed), x, layers=[str(i) for i in range(20)])
    assert "growing" not in names(stream)
    assert stream.layers[-1].variance > 5 * stream.layers[0].variance


class NoWaiting(TorchDispatchMode):
    """Refuse what waits for a device: values that Python reads, shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")
        assert func._overloadpacket.__name__ not in waiting, func
        return func(*args, **(kwargs or {}))


def test_no_layer_waits_for_the_device():
    x = torch.randn(6, 5, 4, 4)
    with pytest.raises(AssertionError), NoWaiting():
        x.sum().item()
    with NoWaiting():
        numbers, gram = _measure.signal_numbers(x, 6, 0, 1, 4)
        gradient = _measure.gradient_numbers(x)
    assert (numbers.shape, gram.shape, gradient.shape) == ((5,), (4, 4), (3,))


def rows(variances):
    return [
        Layer(f"act{i}", 1, "ReLU", "activation", (4, 4), v, 0.1, 3.0, 1.0, 0.0, 0.0, 0.0)
        for i, v in enumerate(variances)
    ]


@pytest.mark.parametrize(
    ("variances", "expected"),
    [
        ([2.0**k for k in range(12)], {"growing"}),
        # Branches of variance 0.3 between the sums: only the sums grow.
        ([v for k in range(12) for v in (2.0**k, 0.3)], {"growing"}),
        ([1.0 + 25 * k for k in range(12)], set()),
        ([2.0**k for k in range(6)], set()),
        ([2.0**-k for k in range(12)], {"shrinking"}),
    ],
)
def test_growth_is_judged_by_its_shape_and_its_size(variances, expected):
    found = of_propagation(rows(variances), samples=4, explosion=None)
    assert {finding.name for finding in found} == expected


def test_only_a_classifier_is_left_out_of_the_similarity():
    hidden = rows([1.0, 1.0, 1.0])
    alike = replace(hidden[-1], similarity=0.95)
    (finding,) = of_propagation([*hidden[:-1], alike], samples=4, explosion=None)
    assert (finding.name, finding.layers) == ("similar", ("act2",))
    head = replace(alike, role="weights")
    assert of_propagation([*hidden[:-1], head], samples=4, explosion=None) == ()


def test_a_shrinking_signal_and_a_vanishing_gradient_are_found():
    model = deep(lambda width: nn.Identity())
    for module in model:
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(0.5)
    assert names(propagation(model, torch.randn(32, 8))) >= {"shrinking", "vanishing"}


def test_an_exploding_gradient_is_found():
    layers = [nn.Linear(6, 6, bias=False) for _ in range(9)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, 2)
    found = propagation(nn.Sequential(*layers), torch.randn(5, 6))
    (finding,) = (f for f in found.findings if f.name == "exploding")
    assert "128 times" in finding.sentence


def test_a_dead_layer_and_what_it_cuts_off_are_found():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].bias.data.fill_(-100.0)
    found = propagation(model, torch.randn(8, 4))
    assert [row.dead for row in found.layers] == [0, 1, 1]
    dead, cut = found.findings[:2]
    assert (dead.name, dead.layers) == ("dead", ("1", "2"))
    assert "100%" in dead.sentence
    assert (cut.name, cut.layers) == ("no gradient", ("0",))


def test_nan_and_inf_are_reported_and_named():
    class Break(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            return self.second(torch.where(torch.arange(4) == 0, torch.inf, x))

    found = propagation(Break(), torch.randn(8, 4))
    assert found.layers[0].lost == 0
    assert found.layers[1].lost == 1
    assert math.isnan(found.layers[1].variance)
    assert found.findings[0].name == "not finite"
    assert "layer 2 of 2 (second)" in found.findings[0].sentence
    row = json.loads(found.to_json())["layers"][1]
    assert row["variance"] is None
    assert row["lost"] == 1


def test_the_table_and_the_dict_say_what_was_measured():
    found = propagation(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 4)
    )
    text = str(found).splitlines()
    assert text[0].split()[:4] == ["layer", "kind", "variance", "similarity"]
    assert text[1].split()[:3] == ["0", "Linear", f"{found.layers[0].variance:.3g}"]
    data = json.loads(found.to_json())
    assert data["layers"][1]["similarity"] == found.layers[1].similarity
    assert data["layers"][1]["shape"] == [8, 6]
    assert repr(found) == "Propagation(3 layers, 0 findings)"


def test_the_picture_shows_the_four_statistics():
    found = propagation(deep(nn.BatchNorm1d, depth=6), torch.randn(16, 8))
    axes = found.plot().axes
    drawn = [axis.lines[0].get_ydata().tolist() for axis in axes]
    acts = [row for row in found.layers if row.role == "activation"]
    fcs = [row for row in found.layers if row.role == "weights"]
    assert drawn[0] == [row.variance for row in acts]
    assert drawn[1] == [row.similarity for row in acts]
    assert drawn[2] == [row.stable_rank for row in acts]
    assert drawn[3] == [row.grad_norm for row in fcs]
