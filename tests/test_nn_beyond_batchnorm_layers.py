"""The normalizers of Beyond BatchNorm as modules: modes, formats, dtypes, copies, errors."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from sphereopt.detect import find_spheres
from sphereopt.nn.evonorm import EvoNormB0, EvoNormS0, evonorm_s0
from sphereopt.nn.filter_response import (
    TLU,
    FilterResponseNorm1d,
    FilterResponseNorm2d,
    filter_response_norm,
)
from sphereopt.nn.group_norm import GroupNorm, group_norm
from sphereopt.nn.skip_init import SkipInit
from sphereopt.nn.variance_norm import VarianceNorm1d, VarianceNorm2d, variance_norm

C = 8
LAYERS = {
    "VN": lambda **kw: VarianceNorm2d(C, **kw),
    "VN unbiased": lambda **kw: VarianceNorm2d(C, unbiased=True, **kw),
    "FRN": lambda **kw: FilterResponseNorm2d(C, **kw),
    "FRN eps": lambda **kw: FilterResponseNorm2d(C, 1e-5, learnable_eps=True, **kw),
    "TLU": lambda **kw: TLU(C, **kw),
    "GN": lambda **kw: GroupNorm(C, groups=2, **kw),
    "GN unbiased": lambda **kw: GroupNorm(C, group_size=2, unbiased=True, **kw),
    "S0": lambda **kw: EvoNormS0(C, 4, **kw),
    "S0 linear": lambda **kw: EvoNormS0(C, 4, nonlinear=False, **kw),
    "B0": lambda **kw: EvoNormB0(C, **kw),
    "B0 linear": lambda **kw: EvoNormB0(C, nonlinear=False, **kw),
    "SkipInit": lambda **kw: SkipInit(0.5, **kw),
}
BATCHED = ("VN", "VN unbiased", "B0")
every_layer = pytest.mark.parametrize("name", LAYERS)


def images(seed=0, shape=(4, C, 5, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (1 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def shaken(name, **kw):
    """Return a layer whose parameters are not where they started."""
    layer = LAYERS[name](**kw)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(1)).to(p))
    return layer


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("name", BATCHED)
def test_running_variances_are_the_averages_of_the_batches(name, momentum):
    layer = LAYERS[name](momentum=momentum).double()
    running = np.ones(C)
    for step in range(1, 6):
        x = images(step)
        layer(x)
        weight = 1 / step if momentum is None else momentum
        var = x.numpy().var((0, 2, 3), ddof=int(name == "VN unbiased"))
        running = (1 - weight) * running + weight * var
    torch.testing.assert_close(layer.running_var, torch.from_numpy(running), rtol=1e-13, atol=0)
    assert layer.num_batches_tracked == 5
    layer.reset_running_stats()
    assert bool((layer.running_var == 1).all())


@pytest.mark.parametrize("name", BATCHED)
def test_evaluation_with_the_batchs_own_statistics_is_training(name):
    layer = shaken(name, momentum=1.0).double()
    x = images()
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained, rtol=1e-13, atol=1e-13)
    before = layer.running_var.clone()
    assert not torch.allclose(layer(images(1)), layer.train()(images(1)), rtol=1e-3)
    layer.eval()(images(2))
    assert not torch.equal(layer.running_var, before)  # moved by the batch in train(), once


@pytest.mark.parametrize("name", sorted(set(LAYERS) - set(BATCHED)))
def test_other_layers_are_the_same_in_both_modes_and_sample_by_sample(name):
    layer, x = shaken(name).double(), images()
    trained = layer(x)
    assert torch.equal(layer.eval()(x), trained)
    alone = torch.cat([layer(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(alone, trained, rtol=1e-13, atol=1e-13)


@every_layer
def test_memory_formats_change_neither_values_nor_gradients(name):
    layer, x = shaken(name).double(), images()
    plain = x.clone().requires_grad_()
    wanted = layer(plain)
    wanted.square().sum().backward()
    strided = torch.zeros(4, C, 5, 6, dtype=torch.float64)[..., ::2]
    strided.copy_(x)
    for other in (x.to(memory_format=torch.channels_last), strided, x.mT.contiguous().mT):
        assert not other.is_contiguous()
        other = other.detach().requires_grad_()
        out = copy.deepcopy(layer)(other)
        out.square().sum().backward()
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.grad, plain.grad, rtol=1e-11, atol=1e-11)
    assert layer(x.to(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deviation", [1.0, 256.0])
def test_half_precision_is_the_exact_result_rounded(name, dtype, deviation):
    """Activations of deviation 256 have squares that fp16 cannot hold."""
    layer = shaken(name)  # parameters and buffers stay float32, as under autocast
    x = ((images(shape=(4, C, 16, 16)) - 1) / 2 * deviation).to(dtype)
    exact = copy.deepcopy(layer).double()
    narrow, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    out, wanted = layer(narrow), exact(wide)
    unit = torch.finfo(dtype).eps
    assert out.dtype == dtype
    # Up to four roundings of parts no larger than the largest entry.
    scale = wanted.detach().abs().max()
    assert bool(((out - wanted).detach().abs() < 3 * unit * scale).all())
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out.float() * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert bool(narrow.grad.isfinite().all())
    apart = (narrow.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert float(apart) < 3 * unit
    for p, q in zip(layer.parameters(), exact.parameters(), strict=True):
        assert float((p.grad - q.grad).norm()) < 3 * unit * float(q.grad.norm()) + unit, name
    for mine, theirs in zip(layer.buffers(), exact.buffers(), strict=True):
        # Deviations are rounded to x's dtype before they are squared; a thousand average out.
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=unit / 8, atol=0)


@every_layer
def test_half_precision_keeps_no_wide_copy_for_the_backward(name):
    x = images(dtype=torch.bfloat16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LAYERS[name]()(x)
    assert {t.dtype for t in kept if t.numel() >= x.numel()} <= {torch.bfloat16}
    assert sum(t.numel() == x.numel() for t in kept) <= 6


@every_layer
def test_layers_run_under_autocast_after_a_convolution(name):
    conv, layer = nn.Conv2d(3, C, 3), LAYERS[name]()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(conv(x))
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert bool(conv.weight.grad.isfinite().all())


# Dynamo itself makes an instance of an autograd.Function, and torch deprecates doing so.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_without_breaks_it_is_the_same(name, dtype):
    torch._dynamo.reset()
    layer = shaken(name)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = images(dtype=dtype)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = compiled(one), layer(two)
    out.float().square().sum().backward()
    wanted.float().square().sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(out, wanted, **close)
    torch.testing.assert_close(one.grad, two.grad, **close)
    for mine, theirs in zip(compiled.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@every_layer
def test_copies_pickles_and_state_dicts_are_the_layer(name):
    layer = shaken(name)
    x = images(dtype=torch.float32)
    layer(x)
    layer.eval()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = LAYERS[name]().eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), layer(x))
    loaded.reset_parameters()
    fresh = LAYERS[name]().state_dict()
    running = "num_batches_tracked", "running_var"
    for key, value in loaded.state_dict().items():
        if key not in running or name in BATCHED:
            assert torch.equal(value, fresh[key]), key


@every_layer
def test_device_and_dtype_are_those_asked_for(name):
    meta = LAYERS[name](device="meta", dtype=torch.bfloat16)
    tensors = [*meta.parameters(), *meta.buffers()]
    assert all(t.is_meta for t in tensors)
    assert {t.dtype for t in tensors} <= {torch.bfloat16, torch.long}
    assert all(p.dim() == 1 for p in meta.parameters())  # sharded training refuses 0-dim ones


def test_what_layers_print():
    assert [repr(make()) for make in LAYERS.values()] == [
        "VarianceNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, "
        "track_running_stats=True)",
        "VarianceNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, "
        "track_running_stats=True, unbiased=True)",
        "FilterResponseNorm2d(8, eps=1e-06, affine=True, bias=True, learnable_eps=False)",
        "FilterResponseNorm2d(8, eps=1e-05, affine=True, bias=True, learnable_eps=True)",
        "TLU(8)",
        "GroupNorm(8, groups=2, group_size=4, eps=1e-05, affine=True, bias=True)",
        "GroupNorm(8, groups=4, group_size=2, eps=1e-05, affine=True, bias=True, unbiased=True)",
        "EvoNormS0(8, groups=4, eps=1e-05, affine=True, bias=True)",
        "EvoNormS0(8, groups=4, eps=1e-05, affine=True, bias=True, nonlinear=False)",
        "EvoNormB0(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)",
        "EvoNormB0(8, eps=1e-05, momentum=0.1, affine=True, bias=True, "
        "track_running_stats=False, nonlinear=False)",
        "SkipInit(gain=0.5)",
    ]


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("TLU", "SkipInit")])
def test_without_affine_there_is_neither_gain_nor_shift(name):
    layer, affine = LAYERS[name](affine=False).double(), LAYERS[name]().double()
    assert layer.weight is None
    assert layer.bias is None
    torch.testing.assert_close(layer(images()), affine(images()), rtol=1e-14, atol=1e-14)
    assert LAYERS[name](affine=False)(images(dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("TLU", "SkipInit")])
def test_without_bias_there_is_a_gain_alone(name):
    layer, affine = LAYERS[name](bias=False).double(), LAYERS[name]().double()
    assert layer.bias is None
    with torch.no_grad():
        layer.weight.fill_(2)
        affine.weight.fill_(2)
    torch.testing.assert_close(layer(images()), affine(images()), rtol=1e-14, atol=1e-14)


def test_skipinit_scales_by_its_gain():
    assert torch.equal(SkipInit(0.5)(images()), images() / 2)
    assert not bool(SkipInit()(images()).any())


def test_narrow_running_averages_are_divided_by_in_float32():
    x, running = torch.ones(2, C, dtype=torch.float16), torch.zeros(C, dtype=torch.float16)
    # 1e-9 is zero in fp16, and 1/0 infinite.
    assert bool((variance_norm(x, running, eps=1e-9) == 31616).all())


def test_the_linear_evonorms_are_the_affine_map():
    for name in ("S0 linear", "B0 linear"):
        layer = shaken(name).double()
        wanted = images() * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
        torch.testing.assert_close(layer(images()), wanted)


def test_per_sample_gradients_by_vmap_are_those_of_a_loop():
    layer, x = shaken("S0").double(), images()
    parameters = dict(layer.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, sample[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        own = torch.func.grad(loss)(parameters, sample)
        for name in parameters:
            torch.testing.assert_close(each[name][i], own[name])


ERRORS = {
    "num_features=0 must be": lambda: TLU(0),
    "num_features=0 must be at": lambda: FilterResponseNorm2d(0),
    "eps=-1 must not": lambda: FilterResponseNorm2d(C, -1),
    "eps=-1 must not be": lambda: GroupNorm(C, groups=2, eps=-1),
    "eps=-1 must not be n": lambda: EvoNormS0(C, 4, -1),
    "groups=None, group_size=None: give exactly one": lambda: GroupNorm(C),
    "groups=2, group_size=4: give exactly one": lambda: GroupNorm(C, groups=2, group_size=4),
    "groups=3 must divide num_channels=8": lambda: GroupNorm(C, groups=3),
    "group_size=0 must divide num_channels=8": lambda: GroupNorm(C, group_size=0),
    "groups=32 must divide num_features=8": lambda: EvoNormS0(C),
    r"8 channels in dim 1, not shape \(2, 4": lambda: GroupNorm(C, groups=2)(torch.ones(2, 4, 3)),
    r"4-d inputs with 8 channels": lambda: FilterResponseNorm2d(C)(torch.ones(2, C, 3)),
    r"4-d inputs with 8 channels in dim 1": lambda: VarianceNorm2d(C)(torch.ones(2, C, 3)),
    r"TLU\(8\) takes": lambda: TLU(C)(torch.ones(2, 3)),
    r"EvoNormS0\(8\) takes": lambda: EvoNormS0(C, 2)(torch.ones(2, 3, 4, 4)),
    r"two values per group .* in 8 groups": lambda: GroupNorm(C, group_size=1)(torch.ones(2, C)),
    r"two values per group .* in 8 groups;": lambda: EvoNormS0(C, C)(torch.ones(2, C, 1, 1)),
    r"groups=3 must divide the channels": lambda: evonorm_s0(torch.ones(2, C, 4), groups=3),
    r"groups=2 must divide .* dim of positions": lambda: evonorm_s0(torch.ones(2, C), groups=2),
    r"two values per channel": lambda: VarianceNorm2d(C)(torch.ones(1, C, 1, 1)),
    r"variance_norm takes its statistics": lambda: variance_norm(torch.ones(1, C), training=True),
    r"two values per channel ": lambda: VarianceNorm1d(C)(torch.ones(0, C)),
    r"at least 2 positions": lambda: EvoNormB0(C, unbiased=True)(torch.ones(4, C, 1, 1)),
    r"at least 1 positions": lambda: EvoNormB0(C).eval()(torch.ones(4, C, 0, 3)),
    r"at least one position": lambda: FilterResponseNorm1d(C)(torch.ones(4, C, 0)),
    r"running_var=None: outside of training variance": lambda: variance_norm(torch.ones(2, C)),
    r"num_groups=3 must divide": lambda: group_norm(torch.ones(2, C), 3),
}


@pytest.mark.parametrize("message", ERRORS)
def test_bad_input_is_refused_by_name_and_shape(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()


def test_a_refused_batch_leaves_the_running_average_alone():
    layer = EvoNormB0(C, unbiased=True)
    with pytest.raises(ValueError, match="at least 2 positions"):
        layer(torch.ones(4, C, 1, 1))
    assert bool((layer.running_var == 1).all())


@pytest.mark.parametrize("name", ["FRN", "GN", "SkipInit", "TLU"])
def test_an_empty_batch_stays_empty(name):
    assert LAYERS[name]()(torch.ones(0, C, 5, 3)).shape == (0, C, 5, 3)


@every_layer
def test_constant_and_zero_inputs_stay_finite(name):
    for value in (0.0, 3.0):
        x = torch.full((4, C, 5, 3), value, requires_grad=True)
        layer = LAYERS[name]()
        out = layer(x)
        out.sum().backward()
        assert bool(out.isfinite().all())
        assert bool(x.grad.isfinite().all())
    assert filter_response_norm(torch.ones(1, 1, 1), eps=0.0).item() == 1.0


def net(layer, bias):
    after = nn.ReLU() if isinstance(layer, (VarianceNorm2d, GroupNorm)) else TLU(C)
    after = nn.Identity() if isinstance(layer, (EvoNormB0, EvoNormS0)) else after
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 2)]
    return nn.Sequential(nn.Conv2d(3, C, 3, bias=bias), layer, after, *head)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("name", "sphere"),
    [
        ("VN", "row"),
        ("VN unbiased", "row"),
        ("FRN", "row"),
        ("FRN eps", None),
        ("GN", "block:2"),
        ("GN unbiased", "block:4"),
        ("S0", None),
        ("B0", "row"),
    ],
)
def test_detection_finds_what_each_leaves_free(name, sphere, bias):
    report = find_spheres(net(LAYERS[name](), bias), torch.randn(4, 3, 7, 7))
    found = report["0.weight"]
    assert found.sphere == sphere
    assert found.joint == (("0.bias",) if bias and sphere else ())
    assert found.status == ("proved" if sphere else "none")
    others = {key for key, finding in report.items() if finding.sphere}
    assert others <= {"0.weight", "0.bias"}
