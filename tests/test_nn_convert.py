"""Swapping normalizers in a model: what carries over, what is said, and the way back."""

import copy

import pytest
import torch
from torch import nn

import sphereopt as so
from sphereopt.nn.batch_norms import L1BatchNorm1d, L1BatchNorm2d, LpBatchNorm2d, TopKBatchNorm2d
from sphereopt.nn.convert import convert_norm
from sphereopt.nn.evonorm import EvoNormS0
from sphereopt.nn.filter_response import FilterResponseNorm2d
from sphereopt.nn.group_norm import GroupNorm
from sphereopt.nn.variance_norm import VarianceNorm2d
from sphereopt.nn.weights import weight_norm


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, eps=1e-4, momentum=0.2),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def images(n=32, seed=1):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained(model, steps=20):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(images(seed=step)).square().mean().backward()
        optimizer.step()
    return model


def everything(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_lp_with_p_two_is_batch_norm_so_nothing_changes():
    """The one conversion that is exact: running averages, gains, mode and all."""
    model = trained(network())
    model.eval()
    before = model(images())
    conversion = convert_norm(model, nn.BatchNorm2d, LpBatchNorm2d, p=2)
    assert len(conversion) == 2
    assert not any(s.lost or s.fresh for s in conversion)
    assert not any(m.training for m in model.modules())
    assert (model(images()) - before).abs().max() < 1e-6


def test_gains_are_the_same_parameters_so_an_optimizer_goes_on():
    model = network()
    gain, optimizer = model[1].weight, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    conversion = convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d)
    assert model[1].weight is gain
    start = gain.detach().clone()
    model(images()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(gain, start)
    conversion.undo()
    assert model[1].weight is gain


def test_a_running_scale_is_the_root_of_the_running_variance_and_back():
    model = trained(network())
    variance, mean = model[1].running_var.clone(), model[1].running_mean.clone()
    convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d)
    assert torch.allclose(model[1].running_scale, (variance + 1e-4).sqrt())
    assert torch.equal(model[1].running_mean, mean)
    swaps = list(convert_norm(model, L1BatchNorm2d, nn.BatchNorm2d))
    assert "running_scale" not in swaps[0].lost
    assert torch.allclose(model[1].running_var, variance, rtol=1e-4)
    assert int(model[1].num_batches_tracked) == 20


def test_a_running_variance_is_never_negative():
    model = nn.Sequential(L1BatchNorm2d(3, eps=1e-2))
    model[0].running_scale.fill_(1e-2)  # what zero channels have
    convert_norm(model, L1BatchNorm2d, nn.BatchNorm2d)
    assert not model[0].running_var.any()


def test_gains_of_another_shape_start_anew():
    model = network()
    (swap,) = convert_norm(model, nn.BatchNorm2d, lambda old: nn.LayerNorm((8, 8, 8)), names="1")
    assert swap.new.weight.shape == (8, 8, 8)
    assert {"weight", "bias"} <= set(swap.lost)
    assert swap.fresh == ("weight", "bias")
    model(images())


def test_for_gaussian_activations_the_converted_network_is_nearly_the_same():
    """A convolution over white noise is Gaussian: sigma, and sqrt(pi/2) E|x|, are one number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=None))
    for seed in range(20):
        model(images(64, seed))
    model.eval()
    before = model(images())
    convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d)
    assert torch.allclose(model(images()), before, atol=1e-5)
    model.train()
    # 2,304 values per channel: E|x| is known to about 1.6 %.
    assert abs(model(images(64)).std().item() - 1) < 0.02


def test_undo_brings_back_modules_averages_and_function():
    model = trained(network())
    old = dict(model.named_modules())
    state, before = everything(model), model.eval()(images())
    conversion = convert_norm(model, nn.BatchNorm2d, GroupNorm, groups=2)
    assert not torch.allclose(model(images()), before)
    conversion.undo()
    assert dict(model.named_modules()) == old
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model(images()), before)


def test_undo_after_a_move_follows_the_model():
    model = network()
    conversion = convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d)
    model.double()
    conversion.undo()
    assert model[1].running_var.dtype == torch.float64
    model(images().double())


def test_undo_keeps_the_mode_and_parameters_put_there_since():
    model = network()
    conversion = convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d)
    model.eval()
    model[1].weight = nn.Parameter(torch.full((8,), 2.0))
    gain = model[1].weight
    conversion.undo()
    assert not model[1].training
    assert model[1].weight is gain


def test_instance_norm_does_not_inherit_the_habit_of_averaging():
    model = network()
    (swap, _) = convert_norm(model, nn.BatchNorm2d, nn.InstanceNorm2d)
    assert (swap.new.track_running_stats, swap.new.affine) == (False, True)
    assert "track_running_stats=True" in swap.lost
    (swap, _) = convert_norm(model, nn.InstanceNorm2d, nn.BatchNorm2d)
    assert swap.new.track_running_stats
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    (swap,) = convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d)
    assert not swap.new.track_running_stats


def test_a_learned_eps_is_lost_not_handed_on_as_an_option():
    model = nn.Sequential(FilterResponseNorm2d(3, eps=1e-2, learnable_eps=True))
    (swap,) = convert_norm(model, FilterResponseNorm2d, nn.BatchNorm2d)
    assert "eps" in swap.lost
    assert swap.new.eps == 1e-5
    assert model(torch.randn(2, 3, 4, 4)).isfinite().all()


@pytest.mark.parametrize("target", ["L1BatchNorm2d", lambda old: None])
def test_a_target_that_gives_no_module_is_refused(target):
    model = network()
    with pytest.raises(TypeError, match=r"target"):
        convert_norm(model, nn.BatchNorm2d, target)
    assert type(model[1]) is nn.BatchNorm2d


def test_undo_twice_or_out_of_order_changes_nothing():
    model = network()
    first = convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d)
    second = convert_norm(model, L1BatchNorm2d, VarianceNorm2d)
    now = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="'1' is no longer the layer"):
        first.undo()
    assert dict(model.named_modules()) == now
    second.undo()
    first.undo()
    assert type(model[1]) is nn.BatchNorm2d
    with pytest.raises(RuntimeError, match="undone already"):
        first.undo()


def test_names_and_skip_are_globs():
    model = network()
    conversion = convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d, names="3.*")
    assert [s.name for s in conversion] == ["3.1"]
    conversion = convert_norm(model, (nn.BatchNorm2d, L1BatchNorm2d), VarianceNorm2d, skip=["3.*"])
    assert [s.name for s in conversion] == ["1"]


def test_a_shared_layer_stays_shared():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), nn.ModuleDict({"again": norm})["again"])
    conversion = convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d)
    (swap,) = conversion
    assert (swap.name, swap.also) == ("0", ("2",))
    assert model[0] is model[2]
    assert type(model[2]) is L1BatchNorm2d
    conversion.undo()
    assert model[0] is model[2] is norm


CONVERSIONS = {
    "GroupNorm of torch": (nn.GroupNorm, {"num_groups": 4}),
    "InstanceNorm2d": (nn.InstanceNorm2d, {}),
    "SyncBatchNorm": (nn.SyncBatchNorm, {}),
    "GroupNorm": (GroupNorm, {"group_size": 2}),
    "L1BatchNorm2d": (L1BatchNorm2d, {}),
    "TopKBatchNorm2d": (TopKBatchNorm2d, {"k": 5}),
    "VarianceNorm2d": (VarianceNorm2d, {}),
    "FilterResponseNorm2d": (FilterResponseNorm2d, {"learnable_eps": True}),
    "EvoNormS0": (EvoNormS0, {"groups": 4}),
    "a function": (lambda old: nn.GroupNorm(1, old.num_features), {}),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_account_names_all_that_each_side_has(name):
    target, options = CONVERSIONS[name]
    model = network()
    swaps = list(convert_norm(model, nn.BatchNorm2d, target, **options))
    assert [s.name for s in swaps] == ["1", "3.1"]
    for swap in swaps:
        told = " ".join((*swap.kept, *swap.lost, *swap.fresh))
        for side in (swap.old, swap.new):
            assert all(key in told for key in side.state_dict()), told
        assert torch.equal(swap.new.weight, swap.old.weight)
    if name != "SyncBatchNorm":  # it runs on accelerators only
        model(images()).sum().backward()
        assert model[1].weight.grad is not None


def test_options_carry_over_and_differences_are_told():
    model = network()
    model[1].requires_grad_(False)
    (swap, _) = convert_norm(model, nn.BatchNorm2d, VarianceNorm2d, momentum=0.5)
    assert (swap.new.eps, swap.new.momentum) == (1e-4, 0.5)
    assert "momentum=0.2" in swap.lost
    assert "running_mean" in swap.lost
    assert "eps=0.0001" in swap.kept
    assert not swap.new.weight.requires_grad


def test_without_gains_or_averages_there_are_none():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False, track_running_stats=False))
    (swap,) = convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d)
    assert not swap.new.state_dict()
    assert swap.new.weight is None


@pytest.mark.parametrize("name", [n for n in CONVERSIONS if n != "a function"])
def test_a_layer_without_bias_becomes_one_without(name):
    target, options = CONVERSIONS[name]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, bias=False))
    (swap,) = convert_norm(model, nn.BatchNorm2d, target, **options)
    assert swap.new.bias is None
    assert swap.new.weight is swap.old.weight


def test_hooks_are_told_as_lost():
    model = network()
    model[1].register_forward_hook(lambda *_: None)
    swaps = list(convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d))
    assert "1 hook(s)" in swaps[0].lost
    assert "1 hook(s)" not in swaps[1].lost


def test_layer_norm_becomes_rms_norm():
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4, eps=1e-3))
    (swap,) = convert_norm(model, nn.LayerNorm, nn.RMSNorm)
    assert swap.lost == ("bias",)
    assert swap.new.normalized_shape == (4,)
    assert swap.new.eps == 1e-3


def test_a_transformers_model_converts_and_still_runs():
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=8))
    conversion = convert_norm(model, nn.LayerNorm, nn.RMSNorm)
    assert len(conversion) == 5
    tokens = torch.arange(8).view(1, 8)
    assert model(tokens).last_hidden_state.isfinite().all()
    conversion.undo()
    assert not any(isinstance(m, nn.RMSNorm) for m in model.modules())


def test_spheres_change_with_the_normalizer():
    model = network()
    found = [so.find_spheres(model, images())["0.weight"].sphere]
    convert_norm(model, nn.BatchNorm2d, GroupNorm, groups=2)
    found.append(so.find_spheres(model, images())["0.weight"].sphere)
    assert found == ["row", "block:2"]


def test_the_text_counts_like_layers_once():
    text = str(convert_norm(network(), nn.BatchNorm2d, nn.InstanceNorm2d, eps=1e-5))
    assert text.count("BatchNorm2d -> InstanceNorm2d") == 2  # their eps and momentum differ
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    assert str(convert_norm(model, nn.BatchNorm2d, VarianceNorm2d)).startswith("2 x BatchNorm2d")


def parametrized():
    model = nn.Sequential(nn.BatchNorm2d(3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    return model


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: convert_norm(network(), nn.LayerNorm, nn.RMSNorm),
            "no LayerNorm fits .*has 2 BatchNorm2d",
        ),
        (
            lambda: convert_norm(nn.Sequential(nn.Linear(2, 2)), nn.LayerNorm, nn.RMSNorm),
            "no normalizer at all",
        ),
        (lambda: convert_norm(network(), nn.BatchNorm2d, L1BatchNorm2d, names="5"), "names='5'"),
        (lambda: convert_norm(nn.BatchNorm2d(3), nn.BatchNorm2d, L1BatchNorm2d), "is itself a"),
        (
            lambda: convert_norm(network(), nn.BatchNorm2d, nn.LayerNorm),
            r"'1' \(BatchNorm2d\) normalizes dim 1 and LayerNorm the last dims",
        ),
        (lambda: convert_norm(network(), nn.BatchNorm2d, L1BatchNorm1d), "inputs of different dim"),
        (lambda: convert_norm(network(), nn.BatchNorm2d, nn.GroupNorm), "needs .'num_groups'."),
        (lambda: convert_norm(network(), nn.BatchNorm2d, L1BatchNorm2d, k=3), "no option .'k'."),
        (lambda: convert_norm(network(), nn.BatchNorm2d, weight_norm, k=3), "options .'k'. go to"),
        (lambda: convert_norm(parametrized(), nn.BatchNorm2d, L1BatchNorm2d), "parametrized"),
        (lambda: convert_norm(network(), nn.BatchNorm2d, nn.ReLU), "how many channels ReLU gets"),
    ],
)
def test_what_cannot_be_swapped_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_refused_model_is_left_as_it_was():
    """The second layer is the one that cannot be converted."""
    model = network()
    nn.utils.parametrize.register_parametrization(model[3][1], "weight", nn.Softplus())
    before, state = dict(model.named_modules()), everything(model)
    with pytest.raises(ValueError, match=r"'3.1' .*parametrized tensors"):
        convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d)
    assert dict(model.named_modules()) == before
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_a_copy_of_a_converted_model_trains():
    model = network()
    convert_norm(model, nn.BatchNorm2d, L1BatchNorm2d)
    trained(copy.deepcopy(model), steps=3)
