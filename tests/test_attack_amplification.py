"""What ``amplification`` measures: who amplifies a perturbation, and by whose statistics."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from sphereopt.diagnostics import amplification, fgsm
from sphereopt.diagnostics.amplify import STATISTICS


def net(norm=nn.BatchNorm2d, dtype=torch.float64):
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), norm(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, bias=False), norm(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).to(dtype)  # fmt: skip


def batch(n=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, 8, 8, generator=generator).to(dtype)
    return x, 0.02 * torch.randn(x.shape, generator=generator).to(dtype)


def trained(model, x, passes=200):
    model.train()
    for _ in range(passes):
        model(x)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_every_factor_is_numpys(training):
    model = trained(net(), batch()[0], passes=3).train(training)
    x, delta = batch()
    found = amplification(model, x, delta)
    conv, bn = model[0], model[1]
    a, b = (conv(v).detach().numpy() for v in (x, x + delta))
    size = np.linalg.norm(delta.numpy())

    def normed(v, mean, var):
        return (v - mean[:, None, None]) / np.sqrt(var[:, None, None] + bn.eps)

    own = [(v.mean((0, 2, 3)), v.var((0, 2, 3))) for v in (a, b)]
    kept = bn.running_mean.numpy(), bn.running_var.numpy()
    expected = {
        "batch": normed(b, *own[1]) - normed(a, *own[0]),
        "clean": normed(b, *own[0]) - normed(a, *own[0]),
        "running": normed(b, *kept) - normed(a, *kept),
    }
    row = found.rows[0]
    for name in STATISTICS:
        assert row.before[name] == pytest.approx(np.linalg.norm(b - a) / size, rel=1e-12)
        assert row.after[name] == pytest.approx(np.linalg.norm(expected[name]) / size, rel=1e-10)
    assert row.weight == "0.weight"
    assert row.weight_norm == pytest.approx(conv.weight.detach().norm().item())
    assert found.delta == pytest.approx(size)


def test_deeper_layers_and_the_output_see_consistent_clean_statistics():
    model, (x, delta) = net(), batch()
    found = amplification(model, x, delta)
    # By hand: BatchNorm in train() for the clean batch, its statistics for the other one.
    outputs = []

    def by_hand(moved):
        a, b = x, moved
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                var, mean = torch.var_mean(a, (0, 2, 3), correction=0)
                args = mean, var, module.weight, module.bias
                a, b = (nn.functional.batch_norm(v, *args, eps=module.eps) for v in (a, b))
                outputs.append((b - a).norm().item())
            else:
                a, b = module(a.clone()), module(b.clone())
        return (b - a).norm().item()

    with torch.no_grad():
        end = by_hand(x + delta)
    for row, expected in zip(found.rows, outputs, strict=True):
        assert row.after["clean"] == pytest.approx(expected / found.delta, rel=1e-10)
    assert found.output["clean"] == pytest.approx(end / found.delta, rel=1e-10)


def test_a_grown_weight_amplifies_before_the_norm_and_after_it_by_stale_statistics_only():
    x, delta = batch()
    model = net()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30  # without it, the invariance is exact
    trained(model, x)
    small = amplification(model, x, delta)
    for module in model:
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(10)
    grown = amplification(model, x, delta)
    for before, after in zip(small.rows, grown.rows, strict=True):
        for name in ("batch", "clean"):
            assert after.before[name] == pytest.approx(10 * before.before[name], rel=1e-10)
            assert after.after[name] == pytest.approx(before.after[name], rel=1e-10)
        assert after.weight_norm == pytest.approx(10 * before.weight_norm, rel=1e-12)
    for name in ("batch", "clean"):
        assert grown.output[name] == pytest.approx(small.output[name], rel=1e-10)
    # Running averages of the small weights: 10 times at the first norm, and 10 x 10 at the second.
    assert grown.rows[0].before["running"] == pytest.approx(10 * small.rows[0].before["running"])
    assert grown.rows[0].after["running"] == pytest.approx(10 * small.rows[0].after["running"])
    assert grown.rows[0].stale == pytest.approx(10 * small.rows[0].stale, rel=1e-6)
    assert grown.rows[1].after["running"] > 50 * small.rows[1].after["running"]
    (finding,) = grown.findings
    assert finding.name == "stale"
    assert "amplifies" in finding.sentence
    assert not small.findings


def test_with_fresh_running_averages_the_factor_is_gone_in_eval_too():
    x, delta = batch()
    model = trained(net(), x)
    small = amplification(model, x, delta)
    for module in model:
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(10)
    grown = amplification(trained(model, x), x, delta)
    for before, after in zip(small.rows, grown.rows, strict=True):
        # eps, 1e-5 against a variance of about 0.05, is what is left.
        assert after.after["running"] == pytest.approx(before.after["running"], rel=1e-3)


@pytest.mark.parametrize(
    "norm",
    [
        lambda c: nn.GroupNorm(2, c),
        nn.InstanceNorm2d,
        lambda c: nn.LayerNorm([6, 6] if c == 6 else [4, 4]),
        lambda c: nn.RMSNorm([6, 6] if c == 6 else [4, 4]),
        lambda c: nn.BatchNorm2d(c, track_running_stats=False, affine=False),
    ],
)
def test_normalizers_without_running_averages_are_measured(norm):
    found = amplification(net(norm), *batch())
    assert len(found.rows) == 2
    assert all(row.stale is None for row in found.rows)
    for row in found.rows:
        assert row.after["clean"] == pytest.approx(row.after["running"])


def test_this_librarys_normalizers_are_measured_and_their_scale_tells_how_stale_it_is():
    layers = pytest.importorskip("sphereopt.nn.batch_norms")
    model = net(layers.L1BatchNorm2d)
    x, delta = batch()
    trained(model, x)
    small = amplification(model, x, delta)
    model[0].weight.data.mul_(10)
    grown = amplification(model, x, delta)
    assert small.rows[0].stale == pytest.approx(1, rel=1e-6)
    assert grown.rows[0].stale == pytest.approx(10, rel=1e-3)  # eps
    assert grown.rows[0].after["running"] == pytest.approx(10 * small.rows[0].after["running"])
    assert grown.rows[0].after["clean"] == pytest.approx(small.rows[0].after["clean"], rel=1e-3)


def test_an_attack_may_be_given_as_a_function_and_runs_in_eval():
    model, (x, _) = trained(net(), batch()[0]).train(), batch()
    y, modes = torch.arange(16) % 4, []

    def attack(m, clean):
        modes.append(m.training)
        return fgsm(m, clean, y, 0.03)

    found = amplification(model, x, attack)
    moved = fgsm(model.eval(), x, y, 0.03)
    assert modes == [False]
    assert found.delta == pytest.approx((moved - x).norm().item(), rel=1e-12)


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_found(fail):
    class Net(nn.Sequential):
        def forward(self, x):
            self.count += 1
            if fail and self.count > 3:
                raise ArithmeticError
            return super().forward(x)

    model = Net(*net(), nn.Dropout(0.5))
    model.count = 0
    model[1].momentum = None
    x, delta = batch()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    if fail:
        with pytest.raises(ArithmeticError):
            amplification(model, x, delta)
    else:
        amplification(model, x, delta)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert model[1].momentum is None
    assert model.count == 0
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_what_is_done_later_to_a_normalizers_input_in_place_is_not_seen():
    class Net(nn.Module):
        def __init__(self, later):
            super().__init__()
            self.fc, self.norm, self.later = nn.Linear(4, 6), nn.LayerNorm(6), later

        def forward(self, x):
            x = self.fc(x)
            y = self.norm(x)
            if self.later:
                x.zero_()
            return y

    model, x, delta = Net(False), torch.randn(8, 4), 0.1 * torch.randn(8, 4)
    expected = amplification(model, x, delta)
    model.later = True
    assert amplification(model, x, delta) == expected


def test_the_weight_is_named_only_if_it_is_directly_before():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 4), nn.LayerNorm(4)
    )
    first, second = amplification(model, torch.randn(8, 4), 0.1 * torch.randn(8, 4)).rows
    assert first.weight is None
    assert second.weight == "3.weight"


def test_table_dict_and_picture_show_the_factors():
    found = amplification(net(), *batch())
    text = str(found).splitlines()
    assert text[1].split()[:3] == ["1", "BatchNorm2d", f"{found.rows[0].before['batch']:.3g}"]
    assert text[3].split()[0] == "(output)"
    assert json.loads(found.to_json())["rows"][1]["after"] == found.rows[1].after
    before, after = found.plot().axes
    for axes, side in ((before, "before"), (after, "after")):
        for line, name in zip(axes.lines, STATISTICS, strict=True):
            assert line.get_label() == name
            assert list(line.get_ydata()) == [getattr(row, side)[name] for row in found.rows]


def test_bad_arguments_are_named():
    model, (x, delta) = net(), batch()
    with pytest.raises(ValueError, match="perturbation is zero"):
        amplification(model, x, 0 * delta)
    with pytest.raises(ValueError, match=r"delta has shape \(16, 2, 8, 7\)"):
        amplification(model, x, delta[..., :7])
    with pytest.raises(ValueError, match="Linear has no normalizer"):
        amplification(nn.Linear(2, 2), torch.rand(3, 2), torch.rand(3, 2))
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        amplification(model, x.long(), delta)
