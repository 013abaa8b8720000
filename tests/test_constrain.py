"""constrain: what it does to the weights of any torch optimizer, against other implementations."""

import numpy as np
import pytest
import torch
from small_model import run
from torch import nn

import sphereopt as so
from sphereopt.geometry import angle, norm
from sphereopt.optim.constrain import constrain

STEPS = 60
# Two float64 programs of the same arithmetic in another order: 60 steps of rounding at 1e-16.
SAME = {"rtol": 1e-11, "atol": 1e-12}


def gradients(shapes, steps=STEPS, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(steps)]


def weights(*shapes, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def named(params):
    return [(f"w{i}", p) for i, p in enumerate(params)]


def sgd(params, **options):
    return torch.optim.SGD(named(params), **{"lr": 0.05, "momentum": 0.9, **options})


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.4}, {"momentum": 0}])
@pytest.mark.parametrize("transport", ["none", "project", "rescale", "parallel"])
@pytest.mark.parametrize("sphere", ["tensor", "row", "col", "block:3"])
def test_sgd_is_sphere_sgd_with_the_same_transport(options, transport, sphere):
    shapes = [(6, 4), (3, 5, 2, 2)]
    ours, theirs = weights(*shapes), weights(*shapes)
    held = sgd(ours, **options)
    # "none" of our optimizers is torch's arithmetic: raw gradients in an ambient buffer.
    raw = transport == "none"
    constrain(held, dict.fromkeys(["w0", "w1"], sphere), transport=transport, project=not raw)
    settings = {"lr": 0.05, "momentum": 0.9, "sphere": sphere, "move": "renorm", **options}
    reference = so.SphereSGD(theirs, transport=transport, **settings)
    grads = gradients(shapes)
    run(held, ours, grads)
    run(reference, theirs, grads)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **SAME)


def test_the_transports_are_different_things():
    ends = []
    for transport in ("none", "project", "rescale", "parallel"):
        (w,) = weights((6, 4))
        # Without Nesterov a step goes along the buffer itself, and the last two are one.
        optimizer = sgd([w], nesterov=True)
        constrain(optimizer, {"w0": "row"}, transport=transport)
        run(optimizer, [w], gradients([(6, 4)]))
        ends.append(w.detach())
    for i, one in enumerate(ends):
        for two in ends[:i]:
            assert angle(one, two, "row").max() > 1e-3


def test_joint_spheres_are_sphere_sgds():
    shapes = [(4, 3), (4,)]
    ours, theirs = weights(*shapes), weights(*shapes)
    held = sgd(ours)
    handle = constrain(held, {("w0", "w1"): "row"}, transport="parallel")
    group = {"params": theirs, "sphere": "row", "joint": True}
    reference = so.SphereSGD([group], lr=0.05, momentum=0.9, move="renorm", transport="parallel")
    grads = gradients(shapes)
    run(held, ours, grads)
    run(reference, theirs, grads)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **SAME)
    together = torch.cat([ours[0].detach(), ours[1].detach()[:, None]], dim=1)
    torch.testing.assert_close(norm(together, "row"), handle.radius["w0 + w1"], **SAME)


def adamw_on_rows(w, grads, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """AdamW on rows of fixed norm, in numpy: tangent gradients, moments made tangent after."""
    w = w.copy()
    m, v, radius = np.zeros_like(w), np.zeros_like(w), np.linalg.norm(w, axis=1, keepdims=True)
    for t, g in enumerate(grads, 1):
        unit = w / np.linalg.norm(w, axis=1, keepdims=True)
        h = g - (g * unit).sum(1, keepdims=True) * unit
        m = beta1 * m + (1 - beta1) * h
        v = beta2 * v + (1 - beta2) * h * h
        w = w - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        w = w * radius / np.linalg.norm(w, axis=1, keepdims=True)
        unit = w / np.linalg.norm(w, axis=1, keepdims=True)
        m = m - (m * unit).sum(1, keepdims=True) * unit
    return w


@pytest.mark.parametrize(
    "kind", [{"fused": True}, {"foreach": True}, {"foreach": False}, {"capturable": False}]
)
def test_adamw_of_every_implementation_is_the_one_written_in_numpy(kind):
    (w,) = weights((5, 7))
    grads = gradients([(5, 7)])
    expected = adamw_on_rows(w.detach().numpy(), [g[0].numpy() for g in grads], lr=0.02)
    optimizer = torch.optim.AdamW(named([w]), lr=0.02, weight_decay=0, **kind)
    constrain(optimizer, {"w0": "row"}, transport="project")
    run(optimizer, [w], grads)
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-10, atol=1e-11)


class Normalized(torch.optim.Optimizer):
    """w - lr |w| m/|m|: what the Hyperball optimizers do before they normalize."""

    def __init__(self, params, lr, momentum):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad)
                p.sub_(m, alpha=float(group["lr"] * p.norm() / m.norm()))


def test_a_normalized_step_that_is_held_is_the_hyperball_move():
    ours, theirs = weights((6, 4)), weights((6, 4))
    held = Normalized(named(ours), 0.03, 0.9)
    constrain(held, {"w0": "tensor"}, project=False)
    options = {"lr": 0.03, "momentum": 0.9, "sphere": "tensor", "transport": "none"}
    reference = so.SphereSGD(theirs, move="hyperball", **options)
    grads = gradients([(6, 4)])
    run(held, ours, grads)
    run(reference, theirs, grads)
    torch.testing.assert_close(ours[0], theirs[0], **SAME)


def test_rows_that_no_piece_covers_stay_the_optimizers_own_bit_for_bit():
    ours, theirs = weights((12, 5), dtype=torch.float32), weights((12, 5), dtype=torch.float32)
    held = torch.optim.NAdam(named(ours), lr=0.02)
    handle = constrain(held, {"w0": "block:2@2:8,row@10:11"}, transport="parallel")
    free = torch.optim.NAdam(theirs, lr=0.02)
    grads = gradients([(12, 5)], dtype=torch.float32)
    run(held, ours, grads)
    run(free, theirs, grads)
    own = [0, 1, 8, 9, 11]
    assert torch.equal(ours[0][own], theirs[0][own])
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(held.state[ours[0]][key][own], free.state[theirs[0]][key][own])
    after = norm(ours[0].detach(), "block:2@2:8,row@10:11")
    # One rounding of float32 per entry and step, not one per step taken: the norm is measured.
    torch.testing.assert_close(after, handle.radius["w0"], rtol=3e-7, atol=0)
    assert angle(ours[0].detach(), theirs[0].detach(), "block:2@2:8,row@10:11").min() > 1e-3


def test_an_invariant_network_held_turns_as_at_the_effective_lr_of_its_norm():
    # For an exactly invariant loss a held step with lr is a plain step with lr*(|w|/r)^2.
    x, y = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, dtype=torch.float64)

    def loss(w):
        return (x @ (w / w.norm()) - y).square().mean()

    ours, theirs = weights((5,)), weights((5,))
    held, plain = sgd(ours, momentum=0), sgd(theirs, momentum=0)
    handle = constrain(held, {"w0": "tensor"})
    for _ in range(100):
        plain.param_groups[0]["lr"] = (
            0.05 * float(theirs[0].detach().norm() / handle.radius["w0"]) ** 2
        )
        for (w,), optimizer in ((ours, held), (theirs, plain)):
            optimizer.zero_grad()
            loss(w).backward()
            optimizer.step()
    assert theirs[0].norm() > 1.001 * handle.radius["w0"]
    assert angle(ours[0].detach(), theirs[0].detach()) < 1e-12


LAYOUTS = {
    "channels_last": lambda: torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(5, 8)[:, ::2],
    "transposed": lambda: torch.randn(5, 4).t(),
    "one row": lambda: torch.randn(1, 9),
    "one column": lambda: torch.randn(9, 1),
    "complex": lambda: torch.randn(4, 3, dtype=torch.complex64),
}


@pytest.mark.parametrize("transport", ["none", "project", "rescale", "parallel"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_held_in_place_and_gradients_come_back(layout, transport):
    w = nn.Parameter(LAYOUTS[layout]())
    memory, stride = w.data_ptr(), w.stride()
    optimizer = sgd([w], lr=0.01)
    handle = constrain(optimizer, {"w0": "row"}, transport=transport)
    before = w.detach().clone()
    for _ in range(50):
        grad = torch.randn_like(w)
        kept = grad.clone()
        w.grad = grad
        optimizer.step()
        assert w.grad is grad
        assert torch.equal(grad, kept)
    assert (w.data_ptr(), w.stride()) == (memory, stride)
    seen = [torch.view_as_real(x.detach()) if x.is_complex() else x.detach() for x in (before, w)]
    # A row of one entry has nowhere to go; rounding of float32 as above.
    if layout != "one column":
        assert angle(*seen, "row").min() > 1e-2
    torch.testing.assert_close(norm(seen[1], "row"), handle.radius["w0"], rtol=3e-7, atol=0)


def test_an_empty_parameter_is_let_be():
    w, empty = weights((4, 3), (0, 3))
    optimizer = sgd([w, empty])
    handle = constrain(optimizer, {"w0": "row", "w1": "row"})
    run(optimizer, [w, empty], gradients([(4, 3), (0, 3)], steps=2))
    assert list(handle.radius) == ["w0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_drift_over_2000_steps(dtype):
    (w,) = weights((8, 256), dtype=dtype)
    optimizer = sgd([w], lr=0.02, momentum=0)
    start = norm(w.detach(), "row")
    handle = constrain(optimizer, {"w0": "row"})
    assert handle.radius["w0"].dtype == torch.float64
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        w.grad = torch.randn(w.shape, generator=generator).to(dtype)
        optimizer.step()
    # A factor nearer to 1 than half the spacing of a number rounds away: the norm is off by eps/2
    # at most, where one that is read anew from rounded weights wanders without end.
    off = (norm(w.detach(), "row") / start - 1).abs().max()
    assert off < torch.finfo(dtype).eps / 2
    assert torch.equal(handle.radius["w0"], start)


def test_a_sphere_that_is_initialized_late_keeps_the_norm_it_is_given():
    (w,) = weights((4, 6))
    w.data[1] = 0
    optimizer = sgd([w], lr=0.1)
    with pytest.warns(UserWarning, match="1 of 4 spheres of norm zero"):
        constrain(optimizer, {"w0": "row"})
    g = gradients([(4, 6)])
    run(optimizer, [w], [next(iter(g))])
    assert (w.detach()[1] == 0).all()
    w.data[1] = 2.0
    given = w.detach()[1].norm()
    run(optimizer, [w], [next(iter(g))])
    torch.testing.assert_close(w.detach()[1].norm(), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scaled_by_an_unrounded_factor_and_rounded_once(dtype):
    (w,), (v,) = weights((8, 64), dtype=dtype), weights((8, 64), dtype=dtype)
    held, plain = sgd([w], momentum=0), sgd([v], momentum=0)
    radius = constrain(held, {"w0": "row"}, project=False).radius["w0"][:, None]
    for g in gradients([(8, 64)], dtype=dtype):
        run(held, [w], [g])
        run(plain, [v], [g])
        with torch.no_grad():
            # A factor in bfloat16 would be one of 1, 0.996, 0.992: steps of the whole change.
            wide = v.double()
            v.copy_((wide * (radius / wide.norm(dim=1, keepdim=True)).float()).float())
        # The two norms are of other sums; where an entry is at the border between two numbers of
        # the dtype it may fall to either side.
        differ = w.detach() != v.detach()
        assert differ.sum() <= 2
        with torch.no_grad():
            v.copy_(w)


def test_spheres_of_norm_zero_are_told_once_and_stay_where_they_are():
    (w,) = weights((3, 4))
    with torch.no_grad():
        w[1] = 0
    optimizer = sgd([w])
    with pytest.warns(UserWarning, match="'w0' of shape .* 1 of 3 spheres of norm zero"):
        constrain(optimizer, {"w0": "row"}, transport="parallel")
    run(optimizer, [w], gradients([(3, 4)]))  # a second warning would be an error
    assert torch.equal(w[1], torch.zeros(4, dtype=torch.float64))
    assert w.isfinite().all()
    assert optimizer.state[w]["momentum_buffer"].isfinite().all()


def test_a_step_into_the_origin_is_finite_and_the_next_returns():
    (w,) = weights((1, 4))
    optimizer = sgd([w], lr=1.0, momentum=0)
    handle = constrain(optimizer, {"w0": "row"}, project=False)
    w.grad = w.detach().clone()
    optimizer.step()
    assert torch.equal(w.detach(), torch.zeros(1, 4, dtype=torch.float64))
    run(optimizer, [w], gradients([(1, 4)], steps=1))
    torch.testing.assert_close(norm(w.detach(), "row"), handle.radius["w0"], **SAME)


@pytest.mark.parametrize("transport", ["none", "project", "rescale", "parallel"])
def test_what_does_not_move_stays_bit_for_bit(transport):
    w, idle, frozen = weights((4, 6), (4, 6), (4, 6), dtype=torch.float32)
    optimizer = sgd([w, idle, frozen], lr=0.1)
    constrain(optimizer, dict.fromkeys(["w0", "w1", "w2"], "row"), transport=transport)
    run(optimizer, [w, idle, frozen], gradients([(4, 6)] * 3, steps=3, dtype=torch.float32))
    kept = [x.detach().clone() for x in (w, idle, frozen)]
    moment = optimizer.state[idle]["momentum_buffer"].clone()
    idle.grad = None
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for x, y in zip((w, idle, frozen), kept, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(optimizer.state[idle]["momentum_buffer"], moment)
    assert idle.grad is None


def test_a_zero_gradient_moves_nothing_where_nothing_was_moving():
    (w,) = weights((4, 6), dtype=torch.float32)
    optimizer = torch.optim.AdamW(named([w]), lr=0.1, weight_decay=0)
    constrain(optimizer, {"w0": "row"}, transport="project")
    kept = w.detach().clone()
    run(optimizer, [w], [[torch.zeros(4, 6)]] * 5)
    assert torch.equal(w, kept)
