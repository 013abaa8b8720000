"""Traps of other libraries, in what a step does to weights and buffers."""

import math

import geoopt
import pytest
import torch
from literature_optimizers import ROWS as PUBLISHED
from optimizers import ROWS, Row
from peers import peer
from torch import nn

import sphereopt as so
from sphereopt.geometry import angle, norm, retract, tangent

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
TANGENT = ["project", "parallel", "rescale"]


def noise(steps, *shape):
    return torch.randn(steps, *shape, dtype=torch.float64)


def end(optimizer, w, grads):
    """Return the weights after these gradients; a function gets weights and step."""
    for step, g in enumerate(grads):
        w.grad = g(w.detach(), step) if callable(g) else g.clone()
        optimizer.step()
    return w.detach()


def parameter(start):
    return nn.Parameter(start.clone())


def on_geoopt(start, manifold=None):
    return geoopt.ManifoldParameter(start.clone(), manifold=manifold or geoopt.Sphere())


def plain(x):
    return x.detach().as_subclass(torch.Tensor)


def unit_rows(*shape):
    return nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("how", TANGENT)
@every_row
def test_a_radial_part_of_the_gradient_never_enters_a_buffer(row: Row, how):
    # geoopt's does at the first step, L2 does in every one of AdamP.
    start, grads = torch.randn(4, 9, dtype=torch.float64), noise(50, 4, 9)
    runs = []
    for pull in (0.0, 3.0):
        w = parameter(start)
        optimizer = row.make([w], sphere="row", transport=how)
        runs.append(end(optimizer, w, [lambda x, t, c=pull: grads[t] + c * x] * 50))
    # Muon rounds to bfloat16: where the rounding tips, an entry of the direction moves by 2**-8.
    atol = 1e-11 if row.entrywise else 50 * row.lr * 2**-8
    torch.testing.assert_close(*runs, rtol=0, atol=atol)


def test_geoopt_seeds_its_momentum_with_the_raw_gradient_and_we_do_not():
    start = unit_rows(6, 5)
    g = tangent(start, noise(1, 6, 5)[0], "row")
    w = parameter(start)
    end(so.SphereSGD([w], lr=1e-3, momentum=0.9, sphere="row"), w, [g])
    expected = torch.atan(1e-3 * norm(g, "row"))
    torch.testing.assert_close(angle(start, w.detach(), "row"), expected, rtol=1e-9, atol=0)
    with peer("geoopt", "0.5.1"):
        w = on_geoopt(start)
        end(geoopt.optim.RiemannianSGD([w], lr=1e-3, momentum=0.9), w, [g])
        # 1 + momentum times too long; angles of 1e-3 are their tangents to 1e-6.
        ratio = angle(start, plain(w), "row") / expected
        torch.testing.assert_close(ratio, torch.full_like(ratio, 1.9), rtol=1e-4, atol=0)


def test_geoopt_writes_a_decay_that_does_nothing_into_the_gradient_and_we_refuse_it():
    start, g = unit_rows(6, 5), noise(1, 6, 5)[0]
    for row in ROWS:
        with pytest.raises(ValueError, match=r"weight_decay=0.5 does nothing on a sphere.*'w'"):
            row.make([("w", parameter(start))], sphere="row", weight_decay=0.5)
    with peer("geoopt", "0.5.1"):
        ends = []
        for decay in (0.0, 0.5):
            w = on_geoopt(start)
            optimizer = geoopt.optim.RiemannianSGD([w], lr=0.1, weight_decay=decay)
            ends.append(plain(end(optimizer, w, [g])))
        torch.testing.assert_close(*ends, rtol=0, atol=1e-15)
        assert (w.grad - g).abs().max() > 0.1


@pytest.mark.parametrize("how", [*TANGENT, "none"])
@every_row
def test_to_maximize_is_to_minimize_the_negative(row: Row, how):
    start, grads = torch.randn(4, 9), torch.randn(50, 4, 9)
    flip = not row.options.get("maximize", False)
    one, two = parameter(start), parameter(start)
    options = {"sphere": "row", "transport": how}
    left = end(row.make([one], **options, maximize=flip), one, grads)
    right = end(row.make([two], **options, maximize=not flip), two, -grads)
    assert torch.equal(left, right)


def test_geoopt_adam_minimizes_when_told_to_maximize_and_we_climb():
    start, a = unit_rows(6, 5), noise(1, 6, 5)[0]
    w = parameter(start)
    options = {"lr": 0.1, "second_moment": "sphere", "maximize": True}
    up = end(so.SphereAdam([w], sphere="row", **options), w, [a] * 60)
    # All the way up, to where angles of 0.1 go back and forth across the top.
    assert (angle(up, a, "row") < 0.2).all()
    with peer("geoopt", "0.5.1"):
        w = on_geoopt(start)
        end(geoopt.optim.RiemannianAdam([w], lr=0.1, maximize=True), w, [a] * 60)
        assert (angle(plain(w), -a, "row") < 0.2).all()


@pytest.mark.parametrize("row", [*ROWS, *PUBLISHED], ids=str)
def test_a_grad_scaler_changes_nothing_but_to_leave_infinite_steps_out(row):
    start, grads = torch.randn(4, 9), torch.randn(50, 4, 9)
    on = {"sphere": "row"} if isinstance(row, Row) else {}
    # Lion, Muon and the published ones have no fused form.
    fused = {"fused": True} if on and row.cls in (so.SphereSGD, so.SphereAdam) else {}
    w, twin = parameter(start), parameter(start)
    optimizer, other = row.make([w], **on, **fused), row.make([twin], **on)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    for t, g in enumerate(grads):
        w.grad = scaler.scale(g)
        if t == 10:
            w.grad[2, 3] = torch.inf
        before = w.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        if t == 10:
            assert torch.equal(w.detach(), before)
        else:
            end(other, twin, [g])
    assert torch.equal(w.detach(), twin.detach())  # scales are powers of two: no rounding


def test_geoopt_fused_adam_writes_nan_under_a_grad_scaler():
    with peer("geoopt", "0.5.1"):
        w = on_geoopt(unit_rows(3, 4).float())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale((w * torch.inf).sum()).backward()
        scaler.step(geoopt.optim.RiemannianAdam([w], lr=0.1, fused=True))
        assert plain(w).isnan().any()


@pytest.mark.parametrize("how", ["project", "none"])
@pytest.mark.parametrize("move", ["retract", "exp", "renorm", "hyperball", "rotate"])
@pytest.mark.parametrize("name", ["SphereSGD", "SphereMuon"])
def test_sgdp_projects_its_buffer_by_a_flag_and_ours_is_the_transports_alone(name, move, how):
    # A direction may be the buffer itself: what makes it tangent must not write to it.
    w, grads = torch.randn(4, 6, dtype=torch.float64), noise(50, 4, 6)
    m = torch.zeros_like(w)
    for g in grads:
        h = g if how == "none" else tangent(w, g, "row")
        m = 0.9 * m + (h if name == "SphereSGD" else 0.1 * h)
    for nesterov in (False, True):
        p = parameter(w)  # stays here: lr is 0
        options = {"momentum": 0.9, "nesterov": nesterov, "move": move, "transport": how}
        optimizer = getattr(so, name)([p], lr=0.0, sphere="row", **options)
        end(optimizer, p, grads)
        found = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(found, m, rtol=0, atol=1e-12)


def test_adamp_projects_the_buffer_without_nesterov_only():
    adamp = pytest.importorskip("adamp")
    with peer("adamp", "0.3.0"):
        for nesterov in (False, True):
            w = parameter(torch.randn(4, 6))
            optimizer = adamp.SGDP([w], lr=0.1, momentum=0.9, delta=1e9, nesterov=nesterov)
            g = torch.randn(4, 6)
            end(optimizer, w, [g])
            m = optimizer.state[w]["momentum"]
            assert torch.allclose(m, g) == nesterov


def test_adamp_loses_sight_of_invariant_weights_under_l2_and_we_read_the_model():
    net = nn.Sequential(nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x = torch.randn(32, 64)
    report = so.find_spheres(net, x)
    assert report.spheres == {"0.weight": "row"}
    # Gradients of noise, of zeros, with L2 in them: nothing that is there at the time matters.
    for p in net.parameters():
        p.grad = torch.randn_like(p) + 10 * p.detach()
    assert so.find_spheres(net, x).spheres == report.spheres
    bare = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))
    assert so.find_spheres(bare, x).spheres == {}
    adamp = pytest.importorskip("adamp")
    with peer("adamp", "0.3.0"):
        found = {"tangent": 0, "with L2": 0, "zero": 0}
        for kind in found:
            for _ in range(100):
                w = parameter(torch.randn(8, 64, dtype=torch.float64))
                g = 1e-3 * tangent(w.detach(), torch.randn_like(w), "row") * (kind != "zero")
                g = g + 1e-4 * w.detach() * (kind == "with L2")
                before = w.detach().norm()
                end(adamp.SGDP([w], lr=1e-3, weight_decay=1.0, wd_ratio=0.0), w, [g])
                found[kind] += int(w.detach().norm() >= before)  # decays unless it takes w for one
        assert found == {"tangent": 100, "with L2": 0, "zero": 100}


@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999])
def test_oblique_adam_hides_a_warmup_and_ours_starts_with_adams_step(beta2):
    # Emerging-Optimizers' divides the root by 1 - beta2**t itself: 0.03 of Adam's step at 0.999.
    # It takes norms to be 1, too: these are about 16.
    start = 2.8 * torch.randn(3, 33, dtype=torch.float64)
    w, twin = parameter(start), parameter(start)
    torch_adam = torch.optim.Adam([twin], lr=1.0, betas=(0.9, beta2))
    options = {"lr": 0.5, "betas": (0.9, beta2), "sphere": "row", "move": "retract"}
    g = tangent(start, noise(1, 3, 33)[0], "row")
    u = start - end(torch_adam, twin, [g])
    expected = retract(start, -0.5 * tangent(start, u, "row"), "row")
    torch.testing.assert_close(end(so.SphereAdam([w], **options), w, [g]), expected)
    w = parameter(start)
    end(so.SphereAdam([w], **options, second_moment="sphere"), w, [g])
    # With one second moment per sphere all of Adam's root mean square, 1, is tangent.
    turned = torch.atan(0.5 * math.sqrt(33) / norm(start, "row"))
    torch.testing.assert_close(angle(start, w.detach(), "row"), turned)


def test_vanishing_gradients_turn_a_sphere_where_lr_is_an_angle_and_only_there():
    # REQ: a row of 1e-9 times the gradient turned a third as fast as the others. So here, by what
    # "radians per step" means; a gradient that is exactly zero, and its momentum, are safe.
    sizes = torch.tensor([[1.0], [1e-12], [0.0]], dtype=torch.float64)
    ends = {}
    for name, options in (("SphereAdam", {}), ("SphereSGD", {"momentum": 0.9})):
        w = parameter(torch.randn(3, 20, dtype=torch.float64))
        optimizer, turned = getattr(so, name)([w], lr=0.01, sphere="row", **options), []
        for t in range(200):
            before = w.detach().clone()
            end(optimizer, w, [sizes * noise(1, 3, 20)[0] * (t < 100)])
            turned.append(angle(before, w.detach(), "row"))
        ends[name] = torch.stack(turned)
    adam, sgd = ends["SphereAdam"], ends["SphereSGD"]
    torch.testing.assert_close(adam[:, :2], torch.full_like(adam[:, :2], 0.01))  # to the last step
    assert (sgd[:100, 1] < 1e-10).all()
    # Without a gradient SGD coasts on a momentum that has lost 0.9**100 of itself.
    assert sgd[199, 0] < 1e-4 * sgd[99, 0]
    assert adam[:, 2].max() == 0 == sgd[:, 2].max()


@pytest.mark.parametrize("move", ["retract", "exp", "renorm", "hyperball", "rotate"])
@pytest.mark.parametrize("size", [1e-12, 1e-8, 1e-4])
def test_tiny_steps_keep_their_length(size, move):
    # Cho and Lee's port adds 1e-8 to every norm it divides by: half of 1e-8 radians is lost.
    start = unit_rows(3, 8)
    unit = nn.functional.normalize(tangent(start, noise(1, 3, 8)[0], "row"), dim=1)
    for length in (1.0, 1e-8):
        w, lr = parameter(start), size if move in so.moves.RADIANS else size / length
        end(so.SphereSGD([w], lr=lr, sphere="row", move=move), w, [length * unit])
        made = ((start - w.detach()) * unit).sum(1)
        # The new weights are rounded to 1e-16 of their size.
        torch.testing.assert_close(made, torch.full_like(made, size), rtol=1e-7, atol=2e-16)


@pytest.mark.parametrize(
    "row", [*ROWS, *[row for row in PUBLISHED if row.keeps_norm]], ids=lambda row: f"{row}"
)
def test_directions_of_weights_of_norm_1e_minus_12_are_those_of_norm_1(row):
    # AdamHR projects by max(|w|^2, 1e-10): below a norm of 1e-5 it projects less and less.
    start, grads, c = torch.randn(4, 16), torch.randn(50, 4, 16), 2.0**-40
    keys = ("eps", "ns_eps", "rotational_eps", "adam_eps")
    runs = []
    for scale in (1.0, c):
        w = parameter(start * scale)
        optimizer = row.make([w], sphere="row")
        for group in optimizer.param_groups:
            group.update({key: 0.0 for key in keys if key in group})
            group["lr"] *= scale**2 if isinstance(optimizer, so.SphereSGD) else 1.0
        end(optimizer, w, grads / scale)
        runs.append(w.detach() / scale)
    assert torch.equal(*runs)  # powers of two: no rounding


def test_a_sphere_of_the_whole_tensor_lets_its_rows_drift_apart_and_rows_do_not():
    sizes = torch.linspace(0.2, 2.0, 8)[:, None]
    spread = {}
    for sphere in ("tensor", "row"):
        w = parameter(nn.functional.normalize(torch.randn(8, 27), dim=1))
        optimizer = so.SphereSGD([w], lr=0.02, sphere=sphere)
        end(optimizer, w, [lambda x, t: sizes * tangent(x, torch.randn(8, 27), "row")] * 300)
        sizes_now = norm(w.detach(), "row")
        spread[sphere] = (sizes_now.max() / sizes_now.min()).item()
    assert spread["tensor"] > 2
    assert spread["row"] == pytest.approx(1, abs=1e-6)
    # For a network that normalizes every filter, the report asks for rows.
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    report = so.find_spheres(net, torch.randn(4, 3, 8, 8))
    assert report.spheres["0.weight"] == "row"


def pull(a):
    """Return the gradient of <a, w>/|w|, for rows: tangent, and longer where w is shorter."""
    return lambda w, step: tangent(w, a[step], "row") / norm(w, "row")[:, None]


@pytest.mark.parametrize("how", [*TANGENT, "none"])
@pytest.mark.parametrize("options", [{"radius": "free", "lr": 0.1}, {"lr": 0.05}], ids=str)
def test_a_norm_that_changes_under_way_leaves_no_moments_of_the_wrong_size(options, how):
    # Gradients go with 1/|w|: a plain Adam's second moment would be off by 16 for 1000 steps.
    start, a = torch.randn(4, 9, dtype=torch.float64), noise(60, 4, 9)
    ends = []
    for factor in (1.0, 4.0):
        w = parameter(start)
        optimizer = so.SphereAdam([w], sphere="row", eps=0.0, transport=how, **options)
        end(optimizer, w, [pull(a)] * 30)
        w.data.mul_(factor)
        # The norm comes back with the next step. Its gradient is all that a fixed radius sees of
        # the change; under "free" it is first brought to the believed norm.
        fixed = 4.0 if factor == 1.0 and "radius" not in options else 1.0
        end(optimizer, w, [pull(a[30:] / fixed)])
        torch.testing.assert_close(norm(w.detach(), "row"), norm(start, "row"))
        ends.append(end(optimizer, w, [pull(a[31:])] * 29))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@every_row
def test_a_weight_that_is_frozen_at_first_starts_as_if_the_optimizer_were_new(row: Row):
    start, grads = torch.randn(4, 9), torch.randn(70, 4, 9)
    w, companion, twin = parameter(start), parameter(start), parameter(start)
    # Where lr is an angle the bias correction, one factor on the direction, would not show.
    options = {"sphere": "row", "move": "retract"}
    optimizer, fresh = row.make([w, companion], **options), row.make([twin], **options)
    w.requires_grad_(False)
    end(optimizer, companion, grads[:20])
    w.requires_grad_(True)
    for g in grads[20:]:
        w.grad, companion.grad, twin.grad = g.clone(), g.clone(), g.clone()
        optimizer.step()
        fresh.step()
    assert torch.equal(w.detach(), twin.detach())


@pytest.mark.parametrize("move", ["retract", "exp", "renorm"])
def test_clipping_by_the_global_norm_is_one_factor_on_lr_for_all_blocks(move):
    start = [torch.randn(4, 9, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)]
    ends = []
    for clip in (True, False):
        params = [parameter(x) for x in start]
        optimizer = so.SphereSGD(params, lr=0.1, sphere="row", move=move)
        generator = torch.Generator().manual_seed(1)
        for _ in range(50):
            for p in params:
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            total = nn.utils.get_total_norm([p.grad for p in params]).item()
            if clip:
                nn.utils.clip_grad_norm_(params, 1.0)
            else:  # torch's factor
                optimizer.param_groups[0]["lr"] = 0.1 / (total + 1e-6)
            optimizer.step()
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["SphereAdam", "SphereLion", "SphereMuon", "SphereSGD"])
def test_clipping_by_the_global_norm_does_not_change_an_angle(name):
    options = {"momentum": 0.9, "move": "rotate"} if name == "SphereSGD" else {}
    params = [parameter(torch.randn(4, 9)), parameter(torch.randn(2, 5))]
    optimizer = getattr(so, name)(params, lr=0.01, sphere="row", **options)
    for t in range(50):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = (1 + t) * torch.randn(p.shape)
        nn.utils.clip_grad_norm_(params, 0.1)
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            turned = angle(old, p.detach(), "row")
            # Rounding of float32 weights, beside steps of 0.01.
            torch.testing.assert_close(turned, torch.full_like(turned, 0.01), rtol=1e-4, atol=0)


def test_the_rule_of_thumb_for_the_angle_of_adamw_is_three_times_too_hot():
    lr, decay, steps = 0.02, 0.1, 1600
    # Near the size it settles at, an rms of sqrt(lr / (2 decay)).
    w = parameter(0.3 * torch.randn(16, 64, dtype=torch.float64))
    optimizer = torch.optim.AdamW([w], lr=lr, weight_decay=decay, betas=(0.9, 0.99))
    squares = []
    for _ in range(steps):
        before = w.detach().clone()
        end(optimizer, w, [pull(noise(1, 16, 64))])
        squares.append(angle(before, w.detach(), "row").square().mean())
    found = torch.stack(squares[800:]).mean().sqrt().item()
    ours = so.theory.equilibrium("adamw", lr=lr, weight_decay=decay).angle
    # lr*decay/(1 - beta1) is 2 %, and the second moment lags.
    assert found == pytest.approx(ours, rel=0.03)
    assert math.sqrt(lr * decay) / found == pytest.approx(3.08, rel=0.03)
