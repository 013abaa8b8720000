"""What every optimizer must do with parameters, gradients, state and checkpoints."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from optimizers import ROWS, Row
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sphereopt as so
from sphereopt.geometry import angle, norm
from sphereopt.optim import SphereError, _batching

MOVES = ["retract", "exp", "renorm", "hyperball", "rotate"]
POLICIES = [{"radius": "fixed", "move": move} for move in MOVES]
POLICIES += [{"radius": "fixed", "transport": how} for how in ("parallel", "rescale", "none")]
POLICIES += [{"radius": "free"}, {"radius": "free", "weight_decay": 0.1}]

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
every_policy = pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda p: "-".join(map(str, p.values()))
)


def run(optimizer, params, grads):
    for g in grads:
        for p, x in zip(params, g, strict=True):
            p.grad = None if x is None else x.clone()
        optimizer.step()


@every_policy
@every_row
def test_lr_zero_and_zero_gradient_leave_weights_bitwise(row: Row, policy):
    # L2 in the gradient is a direction of its own: with it, only lr=0 is a standstill.
    coupled = policy.get("weight_decay") and not row.name.startswith("adamw")
    for lr, scale in [(0.0, 1.0)] if coupled else [(0.0, 1.0), (row.lr, 0.0)]:
        w = nn.Parameter(torch.randn(5, 7))
        before = w.detach().clone()
        optimizer = row.make([w], sphere="row", **{**policy, "lr": lr})
        run(optimizer, [w], [[scale * torch.randn(5, 7)] for _ in range(5)])
        assert torch.equal(w.detach(), before)


@every_policy
@every_row
def test_a_missing_gradient_is_no_step(row: Row, policy):
    w, other = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(5, 7))
    before = w.detach().clone()
    optimizer = row.make([w, other], sphere="row", **policy)
    run(optimizer, [w, other], [[None, torch.randn(5, 7)] for _ in range(3)])
    assert torch.equal(w.detach(), before)
    assert not optimizer.state[w]
    assert w.grad is None


@every_policy
@every_row
def test_gradients_and_storage_stay_what_they_are(row: Row, policy):
    # geoopt and adamsrt add weight decay into p.grad; replacing storage breaks DDP and graphs.
    w = nn.Parameter(torch.randn(5, 7))
    place = w.data_ptr()
    optimizer = row.make([w], sphere="row", **policy)
    for _ in range(3):
        g = torch.randn(5, 7)
        w.grad = g.clone()
        holder = w.grad
        optimizer.step()
        assert w.grad is holder
        assert torch.equal(w.grad, g)
    assert w.data_ptr() == place


@every_policy
@every_row
def test_zero_norm_rows_stay_finite_and_are_reported_once(row: Row, policy):
    # geoopt's projx, nGPT and weight_norm turn such rows into NaN.
    w = nn.Parameter(torch.randn(5, 7))
    w.data[2] = 0
    optimizer = row.make([("layer.weight", w)], sphere="row", **policy)
    with pytest.warns(UserWarning, match=r"'layer.weight' of shape \(5, 7\) has 1 of 5 spheres"):
        run(optimizer, [w], [[torch.randn(5, 7)]])
    run(optimizer, [w], [[torch.randn(5, 7)] for _ in range(5)])  # a second warning would raise
    assert torch.isfinite(w).all()
    assert torch.equal(w.detach()[2], torch.zeros(7))
    assert (w.detach()[0] != 0).all()


LONG = [(ROWS[1], move) for move in MOVES] + [(ROWS[5], "rotate"), (ROWS[5], "renorm")]


@pytest.mark.parametrize(("row", "move"), LONG, ids=str)
def test_fixed_norm_holds_for_10000_float32_steps(row: Row, move):
    w = nn.Parameter(torch.randn(8, 33))
    start = norm(w.detach(), "row")
    optimizer = row.make([w], sphere="row", move=move, lr=1e-3)
    noise = torch.randn(100, 8, 33)
    for step in range(10_000):
        w.grad, before = noise[step % 100], w.detach().clone()
        optimizer.step()
    # The norm is measured and reset in every step: one float32 rounding of each entry remains.
    assert (norm(w.detach(), "row") / start - 1).abs().max() <= 1e-6
    # The stored momentum is tangent where it was made, to a float32 rounding of each entry.
    m = optimizer.state[w][optimizer.tangent_buffers[0]]
    radial = (m.double() * before).sum(1) / norm(m, "row") / norm(before, "row")
    assert radial.abs().max() <= (1e-6 if optimizer.linear else 1e-2)


@every_row
def test_the_tangent_step_has_no_radial_part(row: Row):
    # <w, w' - w> is second order: the chord of an angle theta has -r^2 (1 - cos theta).
    w = nn.Parameter(torch.randn(6, 9, dtype=torch.float64))
    optimizer = row.make([w], sphere="row")
    for _ in range(10):
        before = w.detach().clone()
        w.grad = torch.randn(6, 9, dtype=torch.float64)
        optimizer.step()
        theta = angle(before, w.detach(), "row")
        radial = (before * (w.detach() - before)).sum(1)
        expected = -(norm(before, "row") ** 2) * (1 - theta.cos())
        torch.testing.assert_close(radial, expected, rtol=1e-9, atol=1e-12)
        assert (theta > 1e-4).all()


def layout_cases():
    w = torch.randn(6, 4, 3, 3)
    yield "channels_last", w.to(memory_format=torch.channels_last)
    yield "transposed", torch.randn(3, 3, 4, 6).permute(3, 2, 0, 1)
    yield "strided", torch.randn(6, 4, 3, 6)[..., ::2]
    yield "one-row", torch.randn(1, 7)
    yield "one-column", torch.randn(7, 1)
    yield "many-dims", torch.randn(4, 1, 2, 3, 2)


@pytest.mark.parametrize("sphere", ["row", "col", "tensor"])
@pytest.mark.parametrize(
    ("name", "start"), [*layout_cases()], ids=lambda x: x if type(x) is str else ""
)
@every_row
def test_any_layout_gives_the_contiguous_result(row: Row, name, start, sphere):
    # AdamP, SGDP and Nero call .view and raise on channels_last weights; gradients may have
    # yet another layout.
    odd, plain = nn.Parameter(start.clone(memory_format=torch.preserve_format)), None
    with torch.no_grad():
        odd.set_(start) if name == "strided" else None
    plain = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
    strides = odd.stride()
    left, right = row.make([odd], sphere=sphere), row.make([plain], sphere=sphere)
    for step in range(5):
        g = torch.randn(start.shape)
        odd.grad = g.clone() if step % 2 else g.movedim(0, -1).contiguous().movedim(-1, 0)
        plain.grad = g.clone()
        left.step()
        right.step()
    assert odd.stride() == strides
    # Different layouts sum in another order: float32 rounding over five steps.
    torch.testing.assert_close(odd.detach().contiguous(), plain.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1), (3, 1), (1, 4)])
@every_row
def test_small_shapes_on_a_tensor_sphere(row: Row, shape):
    w = nn.Parameter(torch.randn(shape, dtype=torch.float64) + 2)
    start = norm(w.detach())
    optimizer = row.make([w], sphere="tensor")
    run(optimizer, [w], [[torch.randn(shape, dtype=torch.float64)] for _ in range(5)])
    torch.testing.assert_close(norm(w.detach()), start, rtol=1e-14, atol=0)
    assert torch.isfinite(w).all()


@every_policy
@every_row
def test_empty_parameters_are_no_ops(row: Row, policy):
    params = [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(3, 0))]
    optimizer = row.make(params, sphere="row", **policy)
    run(optimizer, params, [[torch.zeros(0, 3), torch.zeros(3, 0)]] * 2)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@every_row
def test_complex_weights_are_real_ones_of_twice_the_entries(row: Row, dtype):
    w = nn.Parameter(torch.randn(4, 3, dtype=dtype))
    real = nn.Parameter(torch.view_as_real(w.detach()).clone())
    left, right = row.make([w], sphere="row"), row.make([real], sphere="row")
    for _ in range(5):
        g = torch.randn(4, 3, dtype=dtype)
        w.grad, real.grad = g, torch.view_as_real(g).clone()
        left.step()
        right.step()
    torch.testing.assert_close(torch.view_as_real(w.detach()), real.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", [ROWS[1], ROWS[5]], ids=str)
def test_hyperball_bug_low_precision_norms_do_not_drift(row: Row, dtype):
    # Re-reading the radius from rounded weights lost 15 % of a bf16 norm in 3000 steps.
    w = nn.Parameter(torch.randn(8, 64).to(dtype))
    start = norm(w.detach(), "row")
    optimizer = row.make([w], sphere="row", lr=0.02, move="rotate")
    for _ in range(3000):
        w.grad = torch.randn(8, 64).to(dtype)
        optimizer.step()
    # What one rounding of 64 entries leaves: eps/2 each, independent, is far below eps.
    assert (norm(w.detach(), "row") / start - 1).abs().max() < torch.finfo(dtype).eps
    assert optimizer.state[w]["radius"].dtype == torch.float64
    assert optimizer.state[w][optimizer.tangent_buffers[0]].dtype == torch.float32


def test_step_in_low_precision_is_rounded_once():
    # A scale factor in bf16 alone is off by up to 4e-3.
    w32 = torch.randn(16, 64).bfloat16().float()
    g = torch.randn(16, 64).bfloat16()
    low, high = nn.Parameter(w32.bfloat16()), nn.Parameter(w32.clone())
    low.grad, high.grad = g.clone(), g.float()
    for p in (low, high):
        so.SphereSGD([p], lr=0.05, sphere="row").step()
    assert torch.equal(low.detach(), high.detach().bfloat16())


def model_and_groups():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4)
    )
    specs = {"0.weight": "row", ("3.weight", "3.bias"): "tensor"}
    return model, so.param_groups(model, specs)


def continue_training(model, optimizer, steps):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 6, generator=generator)).pow(4).mean().backward()
        optimizer.step()


def through_file(state, weights_only=True):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("radius", ["fixed", "free"])
@every_row
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(row: Row, radius):
    model, groups = model_and_groups()
    optimizer = row.make(groups, radius=radius)
    continue_training(model, optimizer, 7)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    fresh, fresh_groups = model_and_groups()
    resumed = row.make(fresh_groups, radius=radius)
    continue_training(fresh, resumed, 2)  # state that the checkpoint must replace
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    twin = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    runs = [(model, optimizer), (fresh, resumed), twin, pickled]
    for net, opt in runs:
        continue_training(net, opt, 5)
    for net, opt in runs[1:]:
        for p, q in zip(model.parameters(), net.parameters(), strict=True):
            assert torch.equal(p, q)
            for key, value in optimizer.state[p].items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(opt.state[q][key], value), key
                    assert opt.state[q][key].dtype == value.dtype


def test_wide_state_survives_a_checkpoint_of_bf16_weights():
    # torch casts every floating state tensor to the dtype of its parameter.
    w = nn.Parameter(torch.randn(4, 8).bfloat16())
    optimizer = so.SphereAdam([w], sphere="row", radius="free", lr=1e-2)
    run(optimizer, [w], [[torch.randn(4, 8).bfloat16()] for _ in range(3)])
    other = so.SphereAdam([w], sphere="row", radius="free", lr=1e-2)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for key, value in optimizer.state[w].items():
        assert torch.equal(other.state[w][key], value), key
        assert other.state[w][key].dtype == value.dtype


def test_a_loaded_state_is_not_shared_with_its_source():
    model, groups = model_and_groups()
    optimizer = so.SphereSGD(groups, lr=0.1, momentum=0.9, radius="free")
    continue_training(model, optimizer, 3)
    state = optimizer.state_dict()
    before = copy.deepcopy(state["state"])
    other_model, other_groups = model_and_groups()
    other = so.SphereSGD(other_groups, lr=0.1, momentum=0.9, radius="free")
    other.load_state_dict(state)
    continue_training(other_model, other, 3)
    for i, values in before.items():
        if "radius" in values:
            for key, value in values.items():
                if key != "step":
                    assert torch.equal(state["state"][i][key], value), key


def sgd(params, **options):
    return so.SphereSGD(params, lr=0.1, momentum=0.9, **options)


def w_and_b():
    return [("w", nn.Parameter(torch.randn(4, 3))), ("b", nn.Parameter(torch.randn(4, 2)))]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: sgd(
                [("w", nn.Parameter(torch.randn(4, 3))), ("c", nn.Parameter(torch.ones(4, 2)))],
                sphere="row",
            ),
            r"this optimizer has 'c' at group 0\[1\].*'b' at group 0\[1\]",
        ),
        (lambda: sgd(w_and_b()[:1], sphere="row"), "no further parameter.*'b' at group"),
        (lambda: sgd(w_and_b(), sphere="tensor"), "'w' has sphere='tensor' in this.*'row' in the"),
        (
            lambda: sgd([("w", nn.Parameter(torch.randn(4, 9))), w_and_b()[1]], sphere="row"),
            r"'w' of shape \(4, 9\) needs momentum_buffer of shape \(4, 9\).*has \(4, 3\)",
        ),
        (
            lambda: sgd([("w", nn.Parameter(torch.randn(6, 3))), w_and_b()[1]], sphere="row"),
            r"'w' of shape \(6, 3\) needs momentum_buffer of shape \(6, 3\)",
        ),
    ],
    ids=["name", "missing", "sphere", "shape", "count"],
)
def test_a_checkpoint_of_other_parameters_names_the_first_that_differs(other, message):
    params = w_and_b()
    source = sgd(params, sphere="row")
    run(source, [p for _, p in params], [[torch.randn(4, 3), torch.randn(4, 2)]])
    target = other()
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(source.state_dict())
    assert not target.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 is out of range"),
        ({"lr": math.nan}, "lr=nan is out of range"),
        ({"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\)"),
        ({"momentum": -0.1}, "momentum=-0.1 is out of range"),
        ({"nesterov": True}, "nesterov=True needs momentum > 0"),
        ({"sphere": "filter"}, "'w' has shape .*sphere='filter' is not a sphere spec"),
        ({"sphere": "block:3"}, r"'w' has shape \(4, 3\), but sphere='block:3' needs a dim 0"),
        ({"move": "jump"}, "move='jump' is none of 'retract'"),
        ({"radius": "big"}, "radius='big' is none of 'fixed', 'free'"),
        ({"transport": "bus"}, "transport='bus' is none of"),
        ({"weight_decay": 0.1}, r"weight_decay=0.1 does nothing.*'w'.*theory.equilibrium"),
        ({"radius": "free", "move": "rotate"}, "move='rotate' takes lr in radians"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_options_say_what_to_do(options, message):
    w = nn.Parameter(torch.randn(4, 3))
    with pytest.raises(ValueError, match=message):
        so.SphereSGD([("w", w)], **{"sphere": "row", **options})


def test_adam_rejects_betas_out_of_range():
    with pytest.raises(ValueError, match=r"betas\[1\]=1.0 is out of range"):
        so.SphereAdam([nn.Parameter(torch.ones(2, 2))], betas=(0.9, 1.0), sphere="row")


def test_row_of_a_bias_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'head.bias' has shape \(10,\), but sphere='row' needs"):
        so.SphereSGD([("head.bias", nn.Parameter(torch.ones(10)))], sphere="row")


def test_free_is_refused_for_constrained_weights():
    group = {"params": [("w", nn.Parameter(torch.ones(2, 2)))], "sphere": "row"}
    with pytest.raises(ValueError, match="'w' is on a sphere by choice"):
        so.SphereSGD([{**group, "kind": "constrained"}], radius="free")


def test_integer_weights_are_refused():
    w = torch.ones(2, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"'w' has dtype torch\.int64"):
        so.SphereSGD([("w", w)], sphere="row")


def test_joint_needs_as_many_spheres_in_each_member():
    params = [("a", nn.Parameter(torch.ones(4, 2))), ("b", nn.Parameter(torch.ones(3, 2)))]
    with pytest.raises(
        ValueError, match=r"as many spheres in each of a, b, but they have \[3, 4\]"
    ):
        so.SphereSGD([{"params": params, "joint": True}], sphere="row")


def test_a_refused_group_is_not_added():
    optimizer = so.SphereSGD([nn.Parameter(torch.ones(2, 2))], sphere="row")
    with pytest.raises(ValueError, match="needs two or more dimensions"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 1


def test_weight_decay_set_by_a_scheduler_is_refused_at_the_step():
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = so.SphereSGD([w], sphere="row")
    optimizer.param_groups[0]["weight_decay"] = 0.1
    w.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="does nothing on a sphere of fixed radius"):
        optimizer.step()


def test_a_sparse_gradient_is_refused_by_name_before_anything_changes():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = so.SphereSGD(table.named_parameters(), lr=0.1, sphere="row")
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(SphereError, match=r"'weight' of shape \(5, 3\) has a sparse gradient"):
        optimizer.step()
    assert torch.equal(table.weight.detach(), before)
    assert not optimizer.state[table.weight]


@pytest.mark.parametrize("policy", [{"radius": "fixed"}, {"radius": "free"}], ids=str)
@every_row
def test_stacking_and_cutting_change_nothing_but_rounding(row: Row, policy, monkeypatch):
    shapes = [(4, 6), (2, 6), (7, 6), (5, 3), (300, 20)]
    start = [torch.randn(s, dtype=torch.float64) for s in shapes]
    grads = [[torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(10)]
    results = []
    for foreach, large in ((False, 1 << 30), (None, 1 << 30), (None, 1000)):
        monkeypatch.setitem(_batching.LARGE, "cpu", large)
        params = [nn.Parameter(x.clone()) for x in start]
        optimizer = row.make(params, sphere="row", foreach=foreach, **policy)
        run(optimizer, params, grads)
        results.append((params, [optimizer.state[p] for p in params]))
    for params, states in results[1:]:
        for p, q in zip(params, results[0][0], strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-13)
        for mine, theirs in zip(states, results[0][1], strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine:
                torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=1e-12)


def test_stacking_keeps_parameters_of_different_age_apart():
    # Adam's bias correction depends on the age; one of these got no gradient at first.
    params = [nn.Parameter(torch.randn(2, 6, dtype=torch.float64)) for _ in range(4)]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    together = so.SphereAdam(params, lr=0.1, sphere="row")
    single = [so.SphereAdam([p], lr=0.1, sphere="row") for p in alone]
    for step in range(5):
        grads = [torch.randn(2, 6, dtype=torch.float64) for _ in params]
        if step < 2:
            grads[3] = None
        run(together, params, [grads])
        for optimizer, p, g in zip(single, alone, grads, strict=True):
            run(optimizer, [p], [[g]])
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-13)


class ScalarReads(TorchDispatchMode):
    """Collects every tensor whose value Python reads: each would be a host sync on a GPU."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.read.append(args[0])
        return func(*args, **(kwargs or {}))


@every_policy
@every_row
def test_no_host_sync_after_the_first_step(row: Row, policy):
    params = [nn.Parameter(torch.randn(5, 7)) for _ in range(4)]
    optimizer = row.make(params, sphere="row", **policy)
    grads = [torch.randn(5, 7) for _ in params]
    run(optimizer, params, [grads])
    with ScalarReads() as reads:
        optimizer.step()
    clocks = {optimizer.state[p]["step"].data_ptr() for p in params}
    # Step counts live on the CPU, as in torch; Adam's own function reads one of ours, too.
    assert all(t.device.type == "cpu" and t.ndim == 0 for t in reads.read)
    assert sum(t.data_ptr() in clocks for t in reads.read) == len(params)
    assert len(reads.read) <= len(params) + 1


@every_row
def test_closure_is_evaluated_with_gradients_and_its_loss_returned(row: Row):
    w = nn.Parameter(torch.randn(3, 4))
    optimizer = row.make([w], sphere="row")

    def closure():
        optimizer.zero_grad()
        loss = (w**3).sum()
        loss.backward()
        return loss

    before = (w**3).sum().item()
    assert optimizer.step(closure).item() == before


@every_row
def test_a_tensor_lr_and_a_float_lr_agree(row: Row):
    start, grads = torch.randn(3, 4), [[torch.randn(3, 4)] for _ in range(5)]
    runs = []
    for lr in (0.125, torch.tensor(0.125)):
        w = nn.Parameter(start.clone())
        run(row.make([w], sphere="row", lr=lr), [w], grads)
        runs.append(w.detach())
    assert torch.equal(*runs)


@every_row
def test_an_infinite_gradient_under_grad_scaler_skips_the_step(row: Row):
    # geoopt's RiemannianAdam(fused=True) takes over the inf check, ignores it, and writes NaN.
    w = nn.Parameter(torch.randn(3, 4))
    before = w.detach().clone()
    optimizer = row.make([w], sphere="row", fused=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((w * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(w.detach(), before)
    optimizer.zero_grad()
    scaler.scale((w**2 * torch.arange(4.0)).sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(w.detach(), before)
    assert torch.isfinite(w).all()


@every_row
def test_stored_norm_is_that_of_weights_loaded_before_the_first_step(row: Row):
    # REQ reads radii at construction: weights loaded afterwards were then rescaled (12.1 -> 10.4).
    w = nn.Parameter(torch.randn(3, 4))
    optimizer = row.make([w], sphere="row")
    with torch.no_grad():
        w.copy_(5 * torch.randn(3, 4))
    loaded = norm(w.detach(), "row")
    run(optimizer, [w], [[torch.randn(3, 4)] for _ in range(3)])
    torch.testing.assert_close(norm(w.detach(), "row"), loaded, rtol=1e-6, atol=0)


def test_construction_changes_no_weight_of_fan_in_one():
    # REQ subtracts row means by default: NaN at construction for Linear(1, n) and depthwise 1x1.
    layer = nn.Linear(1, 5, bias=False)
    before = layer.weight.detach().clone()
    optimizer = so.SphereSGD(layer.parameters(), lr=0.1, momentum=0.9, sphere="row")
    run(optimizer, [layer.weight], [[torch.randn(5, 1)] for _ in range(3)])
    torch.testing.assert_close(layer.weight.detach(), before)  # S^0 has no way to go


@pytest.mark.parametrize("move", ["rotate", "exp", "retract"])
def test_rotate_does_not_amplify_the_rounding_of_a_radial_gradient(move):
    w = nn.Parameter(torch.randn(4, 50))
    before = w.detach().clone()
    optimizer = so.SphereSGD([w], lr=0.1, sphere="row", move=move, transport="none")
    run(optimizer, [w], [[3 * before]])
    assert angle(before, w.detach(), "row").max() < 1e-6


def test_joint_sphere_with_one_gradient_missing_still_moves_as_a_whole():
    w, b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
    optimizer = so.SphereSGD([{"params": [w, b], "joint": True}], lr=0.3, sphere="tensor")
    before = torch.cat([w.detach().flatten(), b.detach()])
    w.grad = torch.randn(3, 4)
    optimizer.step()
    after = torch.cat([w.detach().flatten(), b.detach()])
    torch.testing.assert_close(after.norm(), before.norm())
    torch.testing.assert_close(b.detach() / before[12:], (b.detach() / before[12:])[0].expand(3))
    assert b.grad is None


def test_switching_fixed_to_free_mid_run_starts_from_the_stored_norm():
    w = nn.Parameter(torch.randn(3, 4))
    optimizer = so.SphereSGD([w], lr=0.1, sphere="row")
    run(optimizer, [w], [[torch.randn(3, 4)]])
    optimizer.param_groups[0].update(radius="free", move="renorm", transport="none")
    run(optimizer, [w], [[torch.zeros(3, 4)]])
    state = optimizer.state[w]
    torch.testing.assert_close(state["virtual_radius"], state["radius"])


def test_groups_of_both_kinds_live_in_one_optimizer_and_take_schedules():
    model, groups = model_and_groups()
    optimizer = so.SphereAdam(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(7):
            continue_training(model, optimizer, 1)
            schedule.step()
    radii = [optimizer.state[p]["radius"] for p in (model[0].weight, model[3].weight)]
    torch.testing.assert_close(norm(model[0].weight.detach(), "row"), radii[0], rtol=1e-6, atol=0)
    assert torch.equal(radii[1], optimizer.state[model[3].bias]["radius"])
