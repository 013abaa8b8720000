"""What every published optimizer must do with parameters, gradients, layouts and checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from literature_optimizers import ROWS, Row
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sphereopt as so
from sphereopt.geometry import norm

every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def step(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()


@every_row
def test_gradients_and_storage_stay_what_they_are(row: Row):
    # adamsrt adds L2 into p.grad; replacing storage breaks DDP and captured graphs.
    w = nn.Parameter(torch.randn(5, 7))
    place = w.data_ptr()
    optimizer = row.make([w])
    for _ in range(3):
        g = torch.randn(5, 7)
        w.grad = g.clone()
        holder = w.grad
        optimizer.step()
        assert w.grad is holder
        assert torch.equal(w.grad, g)
    assert w.data_ptr() == place


@every_row
def test_a_missing_gradient_is_no_step(row: Row):
    # REQ's wrapper raises KeyError as soon as one parameter of a group has none.
    w, other = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(5, 7))
    optimizer = row.make([w, other])
    before = w.detach().clone()
    for _ in range(3):
        step(optimizer, [w, other], [None, torch.randn(5, 7)])
    assert torch.equal(w.detach(), before)
    assert w.grad is None
    assert not optimizer.state[w]


@pytest.mark.parametrize("row", [r for r in ROWS if r.keeps_norm], ids=str)
def test_lr_zero_and_zero_gradients_leave_weights_bitwise(row: Row):
    w = nn.Parameter(torch.randn(50, 7))
    optimizer = row.make([w])
    before = w.detach().clone()
    for _ in range(5):
        step(optimizer, [w], [torch.zeros(50, 7)])
    assert torch.equal(w.detach(), before)
    for _ in range(5):  # from here on, some norms are one rounding away from the stored ones
        step(optimizer, [w], [torch.randn(50, 7)])
    optimizer.param_groups[0]["lr"] = 0.0
    before = w.detach().clone()
    for _ in range(5):
        step(optimizer, [w], [torch.randn(50, 7)])
    assert torch.equal(w.detach(), before)


@pytest.mark.parametrize("row", [r for r in ROWS if r.keeps_norm], ids=str)
def test_norms_are_kept_for_2000_float32_steps(row: Row):
    w = nn.Parameter(torch.randn(4, 33))
    optimizer = row.make([w])
    start = norm(w.detach(), "row")
    noise = torch.randn(100, 4, 33)
    for t in range(2000):
        step(optimizer, [w], [noise[t % 100]])
    # The norm is measured and reset in every step: one float32 rounding of each entry remains.
    assert (norm(w.detach(), "row") / start - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("row", [r for r in ROWS if r.keeps_norm], ids=str)
def test_hyperball_bug_bfloat16_norms_do_not_drift(row: Row):
    # levanter reads the radius from the rounded weights in every step: its rule is the second run.
    w = nn.Parameter(torch.randn(4, 64).bfloat16())
    optimizer = row.make([w])
    start = norm(w.detach(), "row")
    theirs = w.detach().clone()
    for _ in range(2000):
        step(optimizer, [w], [torch.randn(4, 64).bfloat16()])
        x, u = theirs, torch.randn(4, 64).bfloat16()
        r = x.norm(dim=1, keepdim=True)
        y = x - 0.02 * u * r / u.norm(dim=1, keepdim=True)
        theirs = y / y.norm(dim=1, keepdim=True) * r
    # One rounding of 64 entries, eps/2 each and independent, is far below eps.
    assert (norm(w.detach(), "row") / start - 1).abs().max() < torch.finfo(torch.bfloat16).eps
    assert (norm(theirs, "row") / start - 1).abs().max() > 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_row
def test_half_precision_is_widened_and_rounded_once(row: Row, dtype):
    start = torch.randn(6, 16).to(dtype)
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    first = {"sphere": None} if row.name.startswith("Rotational") else {}  # centering rounds, too
    left, right = row.make([low], **first), row.make([high], **first)
    g = torch.randn(6, 16).to(dtype)
    step(left, [low], [g])
    step(right, [high], [g.float()])
    assert torch.equal(low.detach(), high.detach().to(dtype))
    assert all(x.dtype == torch.float32 for x in left.state[low].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_row
def test_zero_norm_rows_stay_finite(row: Row, dtype):
    # levanter's AdamH and REQ's centering divide by them.
    w = nn.Parameter(torch.randn(5, 7).to(dtype))
    w.data[2] = 0
    optimizer = row.make([("layer.weight", w)])
    g = torch.randn(5, 7).to(dtype)
    if row.keeps_norm:
        with pytest.warns(
            UserWarning, match=r"'layer.weight' of shape \(5, 7\) has 1 of 5"
        ) as seen:
            step(optimizer, [w], [g])
        assert seen[0].filename == __file__
    else:
        step(optimizer, [w], [g])
    for _ in range(5):
        step(optimizer, [w], [torch.randn(5, 7).to(dtype)])  # a second warning would raise
    assert torch.isfinite(w).all()
    assert (w.detach()[0] != 0).any()


@pytest.mark.parametrize("sphere", ["row", "col", "tensor"])
@every_row
def test_any_layout_gives_the_contiguous_result(row: Row, sphere):
    wide = torch.randn(6, 4, 3, 6)
    starts = [
        torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(3, 3, 4, 6).permute(3, 2, 0, 1),
        wide[..., ::2],
        torch.randn(1, 7),
        torch.randn(7, 1),
    ]
    for start in starts:
        plain = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
        odd, strides = nn.Parameter(start), start.stride()
        left, right = row.make([odd], sphere=sphere), row.make([plain], sphere=sphere)
        for t in range(5):
            g = torch.randn(start.shape)
            other = g.movedim(0, -1).contiguous().movedim(-1, 0)
            step(left, [odd], [other if t % 2 else g.clone()])
            step(right, [plain], [g])
        assert odd.stride() == strides
        # Different layouts sum in another order: float32 rounding over five steps.
        torch.testing.assert_close(odd.detach(), plain.detach(), rtol=1e-4, atol=1e-5)


@every_row
def test_vectors_scalars_and_empty_parameters_are_taken(row: Row):
    shapes = [(), (1,), (5,), (0,), (0, 3), (3, 0), (1, 1), (2, 3)]
    params = [nn.Parameter(torch.randn(s) + 2) for s in shapes]
    optimizer = row.make(params)
    for _ in range(3):
        step(optimizer, params, [torch.randn(s) for s in shapes])
    assert all(torch.isfinite(p).all() for p in params)
    assert not optimizer.state[params[3]]


@pytest.mark.parametrize("zero_mean", [True, False])
@pytest.mark.parametrize("name", ["RotationalAdamW", "RotationalSGD", "RotationalLion"])
def test_req_bug_weights_of_fan_in_one_and_equal_weights_are_not_nan(name, zero_mean):
    # REQ subtracts row means when it is built: Linear(1, n) and depthwise 1x1 become 0/0.
    row = next(r for r in ROWS if r.name == name)
    # The mean of seven 0.9 is rounded up: what is left would be stretched to -0.9.
    params = [nn.Parameter(torch.randn(5, 1)), nn.Parameter(torch.full((3, 7), 0.9))]
    before = [p.detach().clone() for p in params]
    optimizer = row.make(params, zero_mean=zero_mean)
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p.detach(), q)
    for _ in range(3):
        step(optimizer, params, [torch.randn(p.shape) for p in params])
    assert torch.equal(params[0].detach(), before[0])  # a point on S^0 has no way to go
    assert not torch.equal(params[1].detach(), before[1])
    torch.testing.assert_close(norm(params[1].detach(), "row"), norm(before[1], "row"))


def test_req_bug_weights_loaded_after_construction_keep_their_norm():
    # REQ stores the norm of the centered weights: these would jump to it in the first step.
    w = nn.Parameter(torch.randn(3, 8))
    optimizer = ROWS[6].make([w])
    assert w.detach().mean(1).abs().max() < 1e-7
    w.data.copy_(torch.randn(3, 8) + 1)
    loaded = norm(w.detach(), "row")
    step(optimizer, [w], [torch.randn(3, 8)])
    torch.testing.assert_close(norm(w.detach(), "row"), loaded)


class ScalarReads(TorchDispatchMode):
    """Collects every tensor whose value Python reads: each would be a host sync on a GPU."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.read.append(args[0])
        return func(*args, **(kwargs or {}))


@every_row
def test_no_host_sync_after_the_first_step(row: Row):
    # The authors' AdamP waits for the device once or twice per tensor, to decide by a Python if.
    params = [nn.Parameter(torch.randn(5, 7)) for _ in range(4)]
    optimizer = row.make(params)
    step(optimizer, params, [torch.randn(5, 7) for _ in params])
    with ScalarReads() as reads:
        optimizer.step()
    clocks = {optimizer.state[p]["step"].data_ptr() for p in params if "step" in optimizer.state[p]}
    assert all(t.data_ptr() in clocks for t in reads.read)  # step counts live on the CPU


@every_row
def test_a_tensor_lr_and_a_float_lr_agree(row: Row):
    start, grads = torch.randn(3, 4), [torch.randn(3, 4) for _ in range(5)]
    runs = []
    for lr in (0.125, torch.tensor(0.125), torch.tensor([0.125], dtype=torch.float64)):
        w, b = nn.Parameter(start.clone()), nn.Parameter(start[0, 0].clone())
        optimizer = row.make([w, b], lr=lr)
        for g in grads:
            step(optimizer, [w, b], [g, g[0, 0]])
        runs.append(torch.cat([w.detach().flatten(), b.detach().reshape(1)]))
    for other in runs[1:]:  # a root or a quotient of lr is rounded to float32 in a tensor
        torch.testing.assert_close(other, runs[0], rtol=1e-5, atol=1e-6)
        assert other.dtype == torch.float32


@every_row
def test_closure_is_evaluated_with_gradients_and_its_loss_returned(row: Row):
    w = nn.Parameter(torch.randn(3, 4))
    optimizer = row.make([w])

    def closure():
        optimizer.zero_grad()
        loss = (w**3).sum()
        loss.backward()
        return loss

    before = (w**3).sum().item()
    assert optimizer.step(closure).item() == before


def model_and_groups(dtype=torch.float32):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)).to(dtype)
    groups = so.param_groups(model, {"0.weight": "row", "2.weight": "tensor"})
    return model, [{k: v for k, v in g.items() if k != "weight_decay"} for g in groups]


def train(model, optimizer, steps):
    for i in range(steps):
        optimizer.zero_grad()
        x = torch.linspace(-1, 1, 60).view(10, 6) + i
        model(x.to(model[0].weight.dtype)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_row
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(row: Row, dtype):
    model, groups = model_and_groups(dtype)
    optimizer = row.make(groups)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    values = [x for s in state["state"].values() for x in s.values()]
    assert all(isinstance(x, torch.Tensor) for x in values)  # adamsrt: a list and a torch.Size
    fresh, fresh_groups = model_and_groups(dtype)
    resumed = row.make(fresh_groups)
    train(fresh, resumed, 2)  # state that the checkpoint must replace
    fresh.load_state_dict(weights)
    resumed.load_state_dict(state)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    runs = [(model, optimizer), (fresh, resumed), *twins]
    for net, opt in runs:
        train(net, opt, 4)
    for net, opt in runs[1:]:
        for p, q in zip(model.parameters(), net.parameters(), strict=True):
            assert torch.equal(p, q)
            assert optimizer.state[p].keys() == opt.state[q].keys()
            for key, value in optimizer.state[p].items():
                assert torch.equal(opt.state[q][key], value), key
                assert opt.state[q][key].dtype == value.dtype == torch.float32


@every_row
def test_a_loaded_state_is_not_shared_with_its_source(row: Row):
    model, groups = model_and_groups()
    optimizer = row.make(groups)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    other_model, other_groups = model_and_groups()
    other = row.make(other_groups)
    other.load_state_dict(saved)
    train(other_model, other, 3)
    for i, values in before.items():
        for key, value in values.items():
            assert torch.equal(saved["state"][i][key], value), key


@pytest.mark.parametrize(("number", "key"), [(5, "ns_eps"), (7, "rotational_eps")])
def test_a_zero_gradient_needs_no_eps(number, key):
    w = nn.Parameter(torch.randn(5, 7))
    optimizer = ROWS[number].make([w], **{key: 0.0})
    before = w.detach().clone()
    step(optimizer, [w], [torch.zeros(5, 7)])
    assert torch.equal(w.detach(), before)
