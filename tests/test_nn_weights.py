"""Normalized weights: numpy definitions, gradients, torch's own, invariance, half precision."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import sphereopt as so
from sphereopt.nn import weights as W

DTYPE = torch.float64
KINDS = {
    "bwn": W.bounded_weight_norm,
    "bwn, p=1": lambda m, **k: W.bounded_weight_norm(m, p=1, **k),
    "bwn, p=inf": lambda m, **k: W.bounded_weight_norm(m, p=math.inf, **k),
    "bwn, bounded": lambda m, **k: W.bounded_weight_norm(m, gains="bounded", **k),
    "bwn, bounded, p=1": lambda m, **k: W.bounded_weight_norm(m, gains="bounded", p=1, **k),
    "bwn, bounded, p=inf": lambda m, **k: W.bounded_weight_norm(
        m, gains="bounded", p=math.inf, **k
    ),
    "weight_norm": W.weight_norm,
    "centered": W.centered_weight_norm,
    "standardized": W.scaled_weight_standardization,
}
LAYERS = {
    "linear": lambda **k: nn.Linear(5, 4, **k),
    "conv1d": lambda **k: nn.Conv1d(3, 4, 3, **k),
    "conv2d": lambda **k: nn.Conv2d(4, 4, 3, groups=2, **k),
    "conv3d": lambda **k: nn.Conv3d(2, 4, 2, **k),
}


def originals(layer):
    """Return the parameters behind the weight: [gains, directions] or [directions]."""
    return list(layer.parametrizations.weight.parameters())


def norms(v, p):
    flat = np.abs(v.reshape(len(v), -1))
    return flat.max(1) if p == math.inf else (flat**p).sum(1) ** (1 / p)


def by_numpy(name, w, g=None):
    """Return the weight that a paper's formula makes of ``w`` (and gains), row by row."""
    w = w.detach().numpy()
    column = (-1,) + (1,) * (w.ndim - 1)
    n = w[0].size
    p = {"1": 1, "inf": math.inf}.get(name.split("p=")[-1], 2)
    if name.startswith("bwn"):
        unit = w / norms(w, p).reshape(column)
        if "bounded" in name:
            g = norms(w, p) if g is None else g
            return unit * (np.linalg.norm(norms(w, p)) * g / np.linalg.norm(g)).reshape(column)
        rho = np.linalg.norm(w) / (np.sqrt(len(w)) if p == 2 else np.linalg.norm(unit))
        return rho * unit
    mean = w.reshape(len(w), -1).mean(1).reshape(column)
    if name == "weight_norm":
        return w / (norms(w, 2).reshape(column) + 1e-5)
    if name == "centered":
        return w - mean
    std = w.reshape(len(w), -1).std(1).reshape(column)  # biased
    return math.sqrt(2 * math.pi / (math.pi - 1)) * (w - mean) / ((std + 1e-5) * math.sqrt(n))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", KINDS)
def test_the_weight_is_what_the_paper_defines(name, layer):
    torch.manual_seed(0)
    module = LAYERS[layer](dtype=DTYPE)
    expected = by_numpy(name, module.weight)
    assert KINDS[name](module) is module
    assert np.abs(module.weight.detach().numpy() - expected).max() < 1e-11


@pytest.mark.parametrize("name", [n for n in KINDS if "bounded" in n])
def test_bounded_gains_count_by_their_ratios_only(name):
    torch.manual_seed(0)
    module = KINDS[name](nn.Linear(5, 4, dtype=DTYPE))
    gains, directions = originals(module)
    start = directions.detach().clone()
    fresh = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=DTYPE)
    with torch.no_grad():
        gains.copy_(fresh.view(-1, 1))
    expected = by_numpy(name, start, fresh.numpy())
    assert np.abs(module.weight.detach().numpy() - expected).max() < 1e-11
    with torch.no_grad():
        gains.mul_(7)
    assert np.abs(module.weight.detach().numpy() - expected).max() < 1e-11


@pytest.mark.parametrize("name", KINDS)
def test_dims_may_be_counted_from_the_end(name):
    last, second = (nn.Linear(5, 4, dtype=DTYPE) for _ in range(2))
    second.load_state_dict(last.state_dict())
    KINDS[name](last, dim=-1)
    KINDS[name](second, dim=1)
    assert torch.equal(last.weight, second.weight)


def test_rho_can_be_given():
    fixed = W.bounded_weight_norm(nn.Linear(5, 4), rho=3.0)
    assert torch.allclose(fixed.weight.norm(dim=1), torch.full((4,), 3.0))
    bounded = W.bounded_weight_norm(nn.Linear(5, 4), rho=3.0, gains="bounded")
    assert math.isclose(bounded.weight.norm().item(), 3.0, rel_tol=1e-6)


@pytest.mark.parametrize("p", [1, 2, 3.5, math.inf])
def test_the_fixed_rho_keeps_the_layers_frobenius_norm(p):
    module = nn.Conv2d(3, 4, 3, dtype=DTYPE)
    before = module.weight.norm().item()
    W.bounded_weight_norm(module, p=p)
    assert math.isclose(module.weight.norm().item(), before, rel_tol=1e-12)


@pytest.mark.parametrize("gain", [None, 2.0])
@pytest.mark.parametrize("kind", ["weight_norm", "centered", "standardized"])
def test_gains_start_from_a_number_or_from_the_weight(kind, gain):
    module = nn.Linear(5, 4, dtype=DTYPE)
    w = module.weight.detach().clone()
    KINDS[kind](module, gain=gain)
    rows = w if kind == "weight_norm" else w - w.mean(1, keepdim=True)
    scale = math.sqrt(2 * math.pi / (math.pi - 1)) if kind == "standardized" else 1.0
    lengths = rows.norm(dim=1) if gain is None else torch.full((4,), gain * scale, dtype=DTYPE)
    # The eps of 1e-5 beside norms of about one.
    assert torch.allclose(module.weight.norm(dim=1), lengths, rtol=1e-4)
    assert (nn.functional.cosine_similarity(module.weight, rows) - 1).abs().max() < 1e-12
    if gain is None:
        assert (module.weight - rows).abs().max() < 1e-12


def test_weight_norm_is_torchs_when_it_starts_from_the_weight():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(DTYPE)
    theirs = copy.deepcopy(ours)
    for layer in (0, 2):
        W.weight_norm(ours[layer], gain=None, eps=0.0)
        parametrizations.weight_norm(theirs[layer])
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (ours, theirs)]
    for step in range(50):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=DTYPE)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_bounded_weight_norm_is_sphere_sgd_without_a_parametrization():
    """One step from the same point: the same direction, by a parametrization and on the sphere."""
    torch.manual_seed(0)
    bounded = nn.Linear(5, 4, bias=False, dtype=DTYPE)
    with torch.no_grad():
        bounded.weight.div_(bounded.weight.norm(dim=1, keepdim=True))  # radius 1 = rho
    plain = copy.deepcopy(bounded)
    W.bounded_weight_norm(bounded)
    x, y = torch.randn(8, 5, dtype=DTYPE), torch.randn(8, 4, dtype=DTYPE)
    groups = [{"params": [plain.weight], "sphere": "row"}]
    sphere = so.SphereSGD(groups, lr=0.1)
    euclid = torch.optim.SGD(bounded.parameters(), 0.1)
    for _ in range(50):
        for model, optimizer in ((bounded, euclid), (plain, sphere)):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        with torch.no_grad():  # as the authors' third program: v is put back on the sphere
            v = originals(bounded)[0]
            v.div_(v.norm(dim=1, keepdim=True))
    assert (bounded.weight - plain.weight).abs().max() < 1e-9  # the 1e-12 beside norms, 50 times


@pytest.mark.parametrize("name", KINDS)
def test_gradients_to_second_order(name):
    torch.manual_seed(0)
    module = KINDS[name](nn.Conv1d(2, 3, 2, dtype=DTYPE))
    rule = module.parametrizations.weight[0]
    # A generic gain, not one that the start makes special.
    args = [torch.rand_like(o).requires_grad_() for o in originals(module)]
    assert torch.autograd.gradcheck(rule, args)
    assert torch.autograd.gradgradcheck(rule, args)


@pytest.mark.parametrize("name", KINDS)
def test_rescaled_rows_change_nothing(name):
    torch.manual_seed(0)
    module = KINDS[name](nn.Linear(6, 4, dtype=DTYPE), eps=0.0)
    before = module.weight.detach().clone()
    with torch.no_grad():
        originals(module)[-1].mul_(torch.tensor([[0.1], [2.0], [30.0], [1.0]]))
    assert (module.weight - before).abs().max() < 1e-13


@pytest.mark.parametrize("name", KINDS)
def test_detection_puts_every_row_on_a_sphere(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    KINDS[name](model[0])
    report = so.find_spheres(model, torch.randn(16, 6))
    found = {n: (f.status, f.sphere) for n, f in report.items()}
    *gains, directions = (n for n, _ in model[0].named_parameters() if "original" in n)
    assert found[f"0.{directions}"] == ("proved", "row")
    for gain in gains:
        expected = ("proved", "tensor") if "bounded" in name else ("none", None)
        assert found[f"0.{gain}"] == expected


@pytest.mark.parametrize("name", KINDS)
def test_transposed_convolutions_have_their_channels_in_dim_one(name):
    torch.manual_seed(0)
    transposed = nn.ConvTranspose2d(3, 4, 3, dtype=DTYPE)
    rows = nn.Conv2d(3, 4, 3, dtype=DTYPE)
    with torch.no_grad():
        rows.weight.copy_(transposed.weight.transpose(0, 1))
    KINDS[name](transposed, dim=1)
    KINDS[name](rows)
    assert (transposed.weight.transpose(0, 1) - rows.weight).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_the_rounded_truth(name, dtype):
    """Weights of norm up to 1e3 with squares that float16 does not hold."""
    torch.manual_seed(0)
    module = nn.Linear(4000, 3).to(dtype)
    with torch.no_grad():
        module.weight.mul_(2000)
    exact = KINDS[name](copy.deepcopy(module).double())
    KINDS[name](module)
    assert {module.weight.dtype, *(o.dtype for o in originals(module))} == {dtype}
    error = (module.weight.double() - exact.weight).abs().max() / exact.weight.abs().max()
    # Roundings of the gain, of rho or the total, and of the result.
    assert error < 2 * torch.finfo(dtype).eps
    module(torch.ones(2, 4000, dtype=dtype)).mean().backward()
    assert all(o.grad.isfinite().all() for o in originals(module))


@pytest.mark.parametrize("name", KINDS)
def test_a_row_that_becomes_zero_stays_finite(name):
    module = KINDS[name](nn.Linear(5, 4))
    with torch.no_grad():
        originals(module)[-1][1].zero_()
    module(torch.ones(2, 5)).sum().backward()
    assert module.weight[1].abs().max() == 0
    assert all(o.grad.isfinite().all() for o in originals(module))


def test_bounded_gains_that_are_all_zero_stay_finite():
    module = W.bounded_weight_norm(nn.Linear(5, 4), gains="bounded")
    with torch.no_grad():
        originals(module)[0].zero_()
    module(torch.ones(2, 5)).sum().backward()
    assert not module.weight.any()
    assert all(o.grad.isfinite().all() for o in originals(module))


@pytest.mark.parametrize("name", KINDS)
def test_it_comes_off_leaving_the_weight(name):
    module = KINDS[name](nn.Linear(5, 4))
    before = module.weight.detach().clone()
    parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(module.weight, before)
    assert [n for n, _ in module.named_parameters()] in (["weight", "bias"], ["bias", "weight"])


@pytest.mark.parametrize("name", KINDS)
def test_checkpoints_and_copies_carry_everything(name):
    torch.manual_seed(0)
    module = KINDS[name](nn.Linear(5, 4))
    with torch.no_grad():
        for original in originals(module):
            original.add_(torch.rand_like(original))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = KINDS[name](nn.Linear(5, 4))  # another weight, so another rho
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(copy.deepcopy(module).weight, module.weight)


def test_the_representation_names_the_options():
    text = repr(W.bounded_weight_norm(nn.Linear(5, 4), p=math.inf))
    assert "p=inf, dim=0, eps=1e-12" in text
    assert "p=2, centered, dim=0" in repr(W.centered_weight_norm(nn.Linear(5, 4)))


def zero_row():
    layer = nn.Linear(5, 4)
    nn.init.zeros_(layer.weight[2])
    return layer


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: W.weight_norm(nn.Linear(5, 4), "scale"), "'scale' of Linear is not a parameter"),
        (lambda: W.weight_norm(nn.Linear(5, 4), "bias"), r"shape \(4,\).*two dims or more"),
        (lambda: W.weight_norm(nn.Linear(5, 4), dim=2), r"\(4, 5\).*dim=2"),
        (lambda: W.weight_norm(W.weight_norm(nn.Linear(5, 4))), "parametrized already"),
        (lambda: W.bounded_weight_norm(nn.Linear(5, 4), p=0.5), "p=0.5 makes no norm"),
        (lambda: W.bounded_weight_norm(nn.Linear(5, 4), p=math.nan), "p=nan makes no norm"),
        (lambda: W.bounded_weight_norm(nn.Linear(5, 4), gains="free"), "gains='free' is not one"),
        (lambda: W.bounded_weight_norm(nn.Linear(5, 4), rho=0.0), "rho=0.0 must be positive"),
        (lambda: W.weight_norm(zero_row()), r"no direction in channels \[2\]"),
        (lambda: W.bounded_weight_norm(zero_row()), r"shape \(4, 5\).*channels \[2\]"),
        (lambda: W.centered_weight_norm(nn.Linear(1, 4)), r"channels \[0, 1, 2, 3\]"),
    ],
)
def test_what_has_no_direction_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_refused_layer_is_left_as_it_was():
    layer = zero_row()
    with pytest.raises(ValueError, match="no direction"):
        W.bounded_weight_norm(layer)
    assert not parametrize.is_parametrized(layer)


# Inductor itself scripts a helper when it is first loaded.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_compiled_and_eager_agree():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    W.bounded_weight_norm(model[0], gains="bounded")
    x = torch.randn(4, 6)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    got = torch.autograd.grad(
        torch.compile(model, fullgraph=True)(x).sum(), list(model.parameters())
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
