"""What every optimizer must do with parameters, gradients, layouts and precisions."""

import warnings

import pytest
import torch
from optimizers import ROWS, Row
from small_model import continue_training, model_and_groups, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sphereopt as so
from sphereopt.geometry import angle, norm

MOVES = ["retract", "exp", "renorm", "hyperball", "rotate"]
POLICIES = [{"radius": "fixed", "move": move} for move in MOVES]
POLICIES += [{"radius": "fixed", "transport": how} for how in ("project", "parallel", "rescale")]
POLICIES += [{"radius": "free"}, {"radius": "free", "weight_decay": 0.1}]

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
every_policy = pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda p: "-".join(map(str, p.values()))
)


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


@every_policy
@every_row
def test_a_sphere_that_is_initialized_late_keeps_the_norm_it_is_given(row: Row, policy):
    # A stored radius of zero would wipe it out again.
    w = nn.Parameter(torch.randn(5, 7))
    w.data[2] = 0
    optimizer = row.make([w], sphere="row", **policy)
    with pytest.warns(UserWarning, match="initialize them"):
        run(optimizer, [w], [[torch.randn(5, 7)] for _ in range(3)])
    w.data[2] = torch.randn(7)
    given = w.detach()[2].clone()
    run(optimizer, [w], [[torch.randn(5, 7)] for _ in range(3)])
    torch.testing.assert_close(w.detach()[2].norm(), given.norm(), rtol=1e-5, atol=0)
    assert not torch.equal(w.detach()[2], given)


LONG = [(ROWS[1], move) for move in MOVES] + [(ROWS[5], "rotate"), (ROWS[5], "renorm")]


@pytest.mark.parametrize(("row", "move"), LONG, ids=str)
def test_fixed_norm_holds_for_10000_float32_steps(row: Row, move):
    w = nn.Parameter(torch.randn(8, 33))
    start = norm(w.detach(), "row")
    optimizer = row.make([w], sphere="row", move=move, lr=1e-3, transport="project")
    noise = torch.randn(100, 8, 33)
    for step in range(10_000):
        w.grad, before = noise[step % 100], w.detach().clone()
        optimizer.step()
    # The norm is measured and reset in every step: one float32 rounding of each entry remains.
    assert (norm(w.detach(), "row") / start - 1).abs().max() <= 1e-6
    # The stored momentum is tangent where it was made, to a float32 rounding of each entry.
    m = optimizer.state[w][optimizer.tangent_buffers[0]]
    radial = (m.double() * before).sum(1) / norm(m, "row") / norm(before, "row")
    assert radial.abs().max() <= 1e-6


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
    # A clone of a strided slice would be dense: that case is stepped in place.
    copy = start if name == "strided" else start.clone(memory_format=torch.preserve_format)
    odd = nn.Parameter(copy)
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
    # Different layouts sum in another order: float32 rounding over five steps; where that tips a
    # bfloat16 rounding inside Muon, an entry of the direction differs by 2**-8.
    atol = 1e-6 if row.entrywise else 5 * row.lr * 2**-8
    torch.testing.assert_close(odd.detach().contiguous(), plain.detach(), rtol=1e-5, atol=atol)


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
@pytest.mark.parametrize("row", [row for row in ROWS if row.entrywise], ids=str)
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
    # Lion and Muon have no fused form.
    fused = {"fused": True} if row.cls in (so.SphereSGD, so.SphereAdam) else {}
    optimizer = row.make([w], sphere="row", **fused)
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
