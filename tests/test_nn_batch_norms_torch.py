"""The batch norms of norm_matters behave as torch's own do: shapes, buffers, modes, tools."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import sphereopt as so
from sphereopt.nn import batch_norms
from sphereopt.nn.batch_norm_functions import l1_batch_norm, lp_batch_norm, topk_batch_norm
from sphereopt.nn.batch_norms import (
    L1BatchNorm1d,
    L1BatchNorm2d,
    LInfBatchNorm2d,
    LpBatchNorm2d,
    TopKBatchNorm1d,
    TopKBatchNorm2d,
)

SHAPES = {1: [(16, 3), (6, 3, 4)], 2: [(4, 3, 4, 5)], 3: [(2, 3, 2, 3, 4)]}
OPTIONS = {
    "L1": [{}],
    "LInf": [{}, {"constants": "gaussian"}],
    "TopK": [{}, {"k": 3, "constants": "gaussian"}],
    "Lp": [{"p": 3.0}, {"p": 1.5, "constants": "gaussian"}],
}
LAYERS = [
    pytest.param(getattr(batch_norms, f"{name}BatchNorm{d}d"), d, options, id=f"{name}{d}d-{i}")
    for name, choices in OPTIONS.items()
    for d in SHAPES
    for i, options in enumerate(choices)
]
PLANE = [case for case in LAYERS if case.values[1] == 2]
#: Inductor imports a deprecated part of torch, and dynamo makes an instance of a Function.
QUIET = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*should not be inst:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("layer", "dims", "options"), LAYERS)
def test_eval_after_one_batch_of_momentum_1_is_exactly_the_training_output(layer, dims, options):
    for shape in SHAPES[dims]:
        module = layer(3, momentum=1.0, **options)
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        x = 2 * torch.randn(shape) + 5
        y = module(x)
        assert y.shape == x.shape
        assert torch.equal(module.eval()(x), y)


@pytest.mark.parametrize(("layer", "dims", "options"), LAYERS)
def test_other_numbers_of_dims_or_channels_are_refused(layer, dims, options):
    module = layer(3, **options)
    for shape in [(3,), (4, 2, *[4] * dims), *(s for d in SHAPES if d != dims for s in SHAPES[d])]:
        with pytest.raises(ValueError, match=rf"{layer.__name__}\(3\) takes .* not shape"):
            module(torch.randn(shape))
    assert module.num_batches_tracked == 0


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (1, 3, 1)])
def test_a_channel_of_one_value_or_none_is_refused_before_anything_changes(shape):
    module = L1BatchNorm1d(3)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"at least two values per channel .*eval\(\)"):
        module(torch.randn(shape))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert module.eval()(torch.randn(shape)).shape == shape


def test_k_beyond_the_number_of_values_is_refused_before_anything_changes():
    module = TopKBatchNorm1d(3, k=10)
    with pytest.raises(ValueError, match="k=10 must be between 1 and the 9 values per channel"):
        module(torch.randn(9, 3))
    assert module.num_batches_tracked == 0
    module(torch.randn(10, 3))
    with pytest.raises(ValueError, match="k=10 must be"):
        topk_batch_norm(torch.randn(9, 3), training=True)


def test_options_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"p=inf is another layer: use LInfBatchNorm"):
        LpBatchNorm2d(3, p=float("inf"))
    for p in (0.5, float("nan")):
        with pytest.raises(ValueError, match=f"p={p} must be at least 1"):
            lp_batch_norm(torch.randn(8, 3), training=True, p=p)
    with pytest.raises(ValueError, match="constants='exact' must be"):
        LInfBatchNorm2d(3, constants="exact")
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        TopKBatchNorm2d(3, k=0)
    with pytest.raises(ValueError, match="running_mean and running_scale are needed"):
        l1_batch_norm(torch.randn(8, 3))


@pytest.mark.parametrize("function", [l1_batch_norm, topk_batch_norm, lp_batch_norm])
def test_functional_forms_refuse_what_is_no_batch(function):
    running = torch.zeros(3), torch.ones(3)
    for x in (torch.randn(1, 3), torch.randn(0, 3, 4)):
        with pytest.raises(ValueError, match="at least two values per channel"):
            function(x, *running, training=True)
    for x in (torch.ones(20, 3, dtype=torch.long), torch.randn(3)):
        with pytest.raises(ValueError, match=r"x has shape .* and dtype"):
            function(x, *running)
    assert torch.equal(torch.stack(running), torch.tensor([[0.0] * 3, [1.0] * 3]))


@pytest.mark.parametrize(("layer", "dims", "options"), PLANE)
def test_constant_channels_have_finite_outputs_and_gradients(layer, dims, options):
    module = layer(3, **options)
    x = torch.full((4, 3, 4, 5), 7.0)
    x[:, 0] = torch.randn(4, 4, 5)
    x.requires_grad_()
    y = module(x)
    (y * torch.randn_like(y)).sum().backward()
    assert torch.equal(y[:, 1:], torch.zeros(4, 2, 4, 5))
    assert x.grad.isfinite().all()
    assert module.weight.grad.isfinite().all()


def test_a_constant_channel_without_eps_is_nan_and_the_others_are_not():
    x = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    assert l1_batch_norm(x, training=True, eps=0.0).isnan().tolist() == [[True, False]] * 2


def strided(x):
    """Return an equal tensor that is every second column of another."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize(("layer", "dims", "options"), PLANE)
@pytest.mark.parametrize("lay_out", [lambda x: x.to(memory_format=torch.channels_last), strided])
def test_memory_formats_change_nothing(layer, dims, options, lay_out):
    results = []
    x, upstream = torch.randn(4, 3, 4, 6), torch.randn(4, 3, 4, 6)
    for change in (lambda x: x, lay_out):
        leaf = change(x).requires_grad_()
        y = layer(3, **options)(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, change(upstream))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)  # float32 sums in another order
    if lay_out is not strided:
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in results[1])


def test_momentum_none_is_the_plain_mean_of_all_batches():
    module = L1BatchNorm1d(3, momentum=None, dtype=torch.float64)
    batches = [torch.randn(8, 3, dtype=torch.float64) for _ in range(7)]
    for x in batches:
        module(x)
    means = torch.stack([x.mean(0) for x in batches])
    torch.testing.assert_close(module.running_mean, means.mean(0), rtol=1e-14, atol=1e-15)
    assert module.num_batches_tracked == 7


def test_without_running_averages_eval_uses_the_batch():
    module = LInfBatchNorm2d(3, track_running_stats=False)
    x = torch.randn(4, 3, 4, 5)
    assert torch.equal(module(x), module.eval()(x))
    assert set(module.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(("layer", "dims", "options"), LAYERS)
def test_copies_and_state_dicts_carry_everything(layer, dims, options):
    module = layer(3, **options)
    x = torch.randn(SHAPES[dims][0])
    module(x)
    fresh = layer(3, **options)
    fresh.load_state_dict(module.state_dict())
    for other in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert str(other) == str(module)
        assert torch.equal(other.eval()(x), module.eval()(x))
    assert set(module.state_dict()) == {
        *("weight", "bias", "running_mean", "running_scale", "num_batches_tracked")
    }


def test_the_running_averages_keep_no_graph_alive():
    module = L1BatchNorm1d(3)
    x = torch.randn(8, 3).requires_grad_()
    y = module(x)
    graph = weakref.ref(y.grad_fn)
    assert module.running_mean.grad_fn is None
    assert not module.running_scale.requires_grad
    del y
    gc.collect()
    assert graph() is None


def test_all_that_is_saved_for_the_backward_pass_is_the_input():
    x = torch.randn(8, 3, 16, 16).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        TopKBatchNorm2d(3)(x)
    large = [t for t in saved if t.numel() > 3]
    assert len(large) == 1
    assert large[0] is x


def test_gradients_of_functorch_agree_and_vmap_is_refused():
    module = L1BatchNorm2d(3, track_running_stats=False)
    x = torch.randn(4, 3, 4, 5)

    def f(x):
        return module(x).pow(3).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(f)(x), expected)
    with pytest.raises(RuntimeError, match="does not have vmap support"):
        torch.func.vmap(module)(torch.stack([x, x]))


def conv(dims, bias=False):
    return getattr(nn, f"Conv{dims}d")(2, 3, 2, bias=bias)


def network(layer, dims, options, bias=False):
    x = torch.randn({1: (8, 2, 5), 2: (6, 2, 4, 4), 3: (4, 2, 4, 4, 4)}[dims])
    body = nn.Sequential(conv(dims, bias), layer(3, **options), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(body(x).shape[1], 2)), x


@pytest.mark.parametrize(("layer", "dims", "options"), LAYERS)
def test_detection_proves_the_filters_before_the_layer(layer, dims, options):
    model, x = network(layer, dims, options)
    finding = so.find_spheres(model, x)["0.weight"]
    assert (finding.status, finding.sphere) == ("proved", "row")


@pytest.mark.parametrize(("layer", "dims", "options"), PLANE)
def test_detection_sees_through_half_precision_and_a_bias(layer, dims, options):
    model, x = network(layer, dims, options, bias=True)
    finding = so.find_spheres(model.half(), x.half())["0.weight"]
    assert (finding.status, finding.sphere) == ("proved", "row")


def test_a_frozen_layer_is_no_proof():
    model, x = network(L1BatchNorm2d, 2, {})
    model(x)
    model[1].eval()
    assert so.find_spheres(model, x)["0.weight"].status == "none"


@QUIET
@pytest.mark.parametrize(("layer", "dims", "options"), PLANE)
def test_compiled_is_the_same(layer, dims, options):
    torch._dynamo.reset()
    plain = layer(3, momentum=None, **options)
    ours = copy.deepcopy(plain)
    # Inductor, which is slow to compile, for what it could break: sums, and ties that it may round.
    thorough = layer is L1BatchNorm2d or options.get("k") == 3
    backend = "inductor" if thorough else "aot_eager"
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for batch in (4, 6):  # the second size compiles for any
        x = torch.randn(batch, 3, 4, 5)
        upstream = torch.randn_like(x)
        results = []
        for f in (plain, compiled):
            leaf = x.clone().requires_grad_()
            y = f(leaf)
            results.append((y, *torch.autograd.grad(y, leaf, upstream)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=5e-6)  # float32 sums in another order
    torch.testing.assert_close(ours.running_scale, plain.running_scale)
    torch.testing.assert_close(compiled.eval()(x), plain.eval()(x))


class DividesByTheAverage(nn.Module):
    """Divide by the running scale: what the weights scale is there, but so is the past."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        self.scale.lerp_(x.detach().abs().mean((0, 2, 3)), 0.1)
        return x / self.scale.view(1, 3, 1, 1)


def test_an_output_divided_by_a_running_average_is_no_sphere():
    x = torch.randn(6, 2, 4, 4)
    model = nn.Sequential(conv(2), DividesByTheAverage(), nn.Flatten(), nn.Linear(27, 2))
    assert so.find_spheres(model, x)["0.weight"].status == "none"
