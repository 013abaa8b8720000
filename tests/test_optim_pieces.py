"""Pieces in the step: the fused tensor against its parts, and the contract of every optimizer."""

import io

import pytest
import torch
from optimizers import ROWS, Row
from small_model import run
from torch import nn

import sphereopt as so
from sphereopt import spheres
from sphereopt.optim import SphereError, _batching

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
both_radii = pytest.mark.parametrize("radius", ["fixed", "free"])


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


# Against the same tensor cut by hand: its pieces on spheres, the rest plain, as own parameters

ODD = "block:2@1:7,row@7:9,tensor@10:12"  # rows 0, 9 and 12 on no sphere
PARTS = {"block:2": (1, 7), "row": (7, 9), "tensor": (10, 12)}
REST = [(0, 1), (9, 10), (12, 13)]


def by_hand(row: Row, starts, joint, options):
    """Return parts of the tensors as parameters, and their optimizer: spheres, then the rest."""
    cut = [[nn.Parameter(x[i:j].clone()) for x in starts] for i, j in [*PARTS.values(), *REST]]
    groups = []
    for params, sphere in zip(cut, [*PARTS, None, None, None], strict=True):
        on = {"joint": joint and sphere is not None, "sphere": sphere}
        groups.append({"params": params, **options, **on})
    return cut, row.make(groups)


def fused(row: Row, starts, joint, options):
    params = [nn.Parameter(x) for x in starts]
    return params, row.make(params, sphere=ODD, joint=joint, **options)


def feed(params, cut, grads):
    """Set one gradient on whole tensors, and its parts on the parts."""
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        p.grad = None if g is None else g.clone()
        for parts, (start, stop) in zip(cut, [*PARTS.values(), *REST], strict=True):
            parts[i].grad = None if g is None else g[start:stop].clone()


def same(params, cut, rtol=1e-12, atol=1e-13):
    for i, p in enumerate(params):
        for parts, (start, stop) in zip(cut, [*PARTS.values(), *REST], strict=True):
            torch.testing.assert_close(
                p.detach()[start:stop], parts[i].detach(), rtol=rtol, atol=atol
            )


POLICIES = [{"move": move} for move in ("retract", "exp", "renorm", "hyperball", "rotate")]
POLICIES += [{"transport": how} for how in ("project", "parallel", "rescale")]
POLICIES += [{"radius": "free"}, {"radius": "free", "weight_decay": 0.1}]
every_policy = pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda p: "-".join(map(str, p.values()))
)


@pytest.mark.parametrize("joint", [False, True])
@every_policy
@every_row
def test_a_fused_tensor_moves_as_its_parts_would(row: Row, policy, joint):
    shapes = [(13, 3, 2), (13,), (13, 4)] if joint else [(13, 5), (13, 3, 2), (13, 1)]
    if joint and not row.entrywise:  # Muon: with a vector, rows between spheres are AdamW's too
        shapes[1] = (13, 2)
    starts = [normal(*shape) for shape in shapes]
    cut, plain = by_hand(row, starts, joint, policy)
    params, optimizer = fused(row, starts, joint, policy)
    for _ in range(8):
        feed(params, cut, [normal(*shape) for shape in shapes])
        optimizer.step()
        plain.step()
    same(params, cut)
    group = optimizer.param_groups[0]
    for i, p in enumerate(params):
        keys = optimizer.state_keys(group, params if joint else [p])
        if keys.numbers:  # kept per sphere; what is kept per entry serves the rest alone
            continue
        for key in keys.buffers:
            whole = optimizer.state[p][key]
            assert whole.shape == p.shape
            for parts, (start, stop) in zip(cut, [*PARTS.values(), *REST], strict=True):
                part = plain.state[parts[i]][key]
                torch.testing.assert_close(whole[start:stop], part, rtol=1e-11, atol=1e-12)
    for key in ("radius", *(["virtual_radius"] if policy.get("radius") else [])):
        parts = torch.cat([plain.state[part[0]][key] for part in cut[:3]])
        torch.testing.assert_close(optimizer.state[params[0]][key], parts)


def layouts():
    yield "channels_last", normal(13, 4, 3, 3).to(memory_format=torch.channels_last)
    yield "transposed", normal(4, 13).t()
    yield "strided", normal(13, 8)[:, ::2]
    yield "one-column", normal(13, 1)
    yield "complex", normal(13, 3, dtype=torch.complex128)


@both_radii
@pytest.mark.parametrize(("name", "start"), [*layouts()], ids=lambda x: x if type(x) is str else "")
@every_row
def test_any_layout_and_complex_weights(row: Row, name, start, radius):
    cut, plain = by_hand(row, [start], False, {"radius": radius})
    copied = start if name == "strided" else start.clone(memory_format=torch.preserve_format)
    (p,), optimizer = fused(row, [copied], False, {"radius": radius})
    strides = p.stride()
    for step in range(5):
        g = torch.randn_like(start, memory_format=torch.contiguous_format)
        feed([p], cut, [g])
        if step % 2:
            p.grad = g.movedim(0, -1).contiguous().movedim(-1, 0)
        optimizer.step()
        plain.step()
    assert p.stride() == strides
    same([p], cut)


@both_radii
@every_row
def test_stacking_and_cutting_change_nothing_but_rounding(row: Row, radius, monkeypatch):
    shapes = [(13, 6)] * 3 + [(40, 600), (13, 2, 2)]
    start, results = [normal(*s) for s in shapes], []
    grads = [[normal(*s) for s in shapes] for _ in range(10)]
    for foreach, large in ((False, 1 << 30), (True, 1 << 30), (None, 1000)):
        monkeypatch.setitem(_batching.LARGE, "cpu", large)
        params, optimizer = fused(row, [x.clone() for x in start], False, {"radius": radius})
        optimizer.param_groups[0]["foreach"] = foreach
        run(optimizer, params, grads)
        results.append([*params, *(optimizer.state[p]["radius"] for p in params)])
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            torch.testing.assert_close(x.detach(), y.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", [ROWS[1], ROWS[3], ROWS[5]], ids=str)
def test_half_precision_is_a_float32_step_rounded_once(row: Row, dtype):
    start, g = torch.randn(13, 40).to(dtype), torch.randn(13, 40).to(dtype)
    (low,), lows = fused(row, [start.clone()], False, {})
    (high,), highs = fused(row, [start.float()], False, {})
    for _ in range(5):
        low.grad, high.grad = g.clone(), g.float()
        lows.step()
        highs.step()
        assert torch.equal(low.detach(), high.detach().to(dtype))
        with torch.no_grad():
            high.copy_(low)
    assert lows.state[low]["radius"].dtype == torch.float64
    key = lows.state_keys(lows.param_groups[0], [low]).buffers[0]
    assert lows.state[low][key].dtype == torch.float32


def test_joint_columns_take_a_vector_along():
    # The bias of a transposed convolution: column j of the weight and entry j of the bias.
    w, b = normal(4, 3, 2, 2), normal(3)
    ours = [nn.Parameter(w.clone()), nn.Parameter(b.clone())]
    rows = [nn.Parameter(w.transpose(0, 1).contiguous()), nn.Parameter(b.clone())]
    optimizer = so.SphereAdam(ours, lr=0.1, sphere="col", joint=True)
    plain = so.SphereAdam(rows, lr=0.1, sphere="row", joint=True)
    for _ in range(10):
        g, h = normal(4, 3, 2, 2), normal(3)
        ours[0].grad, ours[1].grad = g, h
        rows[0].grad, rows[1].grad = g.transpose(0, 1).contiguous(), h.clone()
        optimizer.step()
        plain.step()
    torch.testing.assert_close(
        ours[0].detach(), rows[0].detach().transpose(0, 1), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(ours[1].detach(), rows[1].detach(), rtol=0, atol=1e-13)
    assert optimizer.state[ours[1]]["radius"].shape == (3,)
    with pytest.raises(ValueError, match=r"'b' has shape .*'col' needs two or more dimensions"):
        so.SphereSGD([("b", ours[1])], sphere="col")


# The contract


@every_policy
@every_row
def test_lr_zero_zero_gradients_and_missing_ones_are_no_steps(row: Row, policy):
    # Weight decay moves ordinary rows under a zero gradient, as in torch: then only lr=0 stands.
    decays = policy.get("weight_decay")
    for lr, scale in [(0.0, 1.0)] if decays else [(0.0, 1.0), (row.lr, 0.0), (row.lr, None)]:
        start = [torch.randn(13, 5), torch.randn(13)]
        params, optimizer = fused(row, [x.clone() for x in start], True, {**policy, "lr": lr})
        for _ in range(3):
            for p in params:
                p.grad = None if scale is None else scale * torch.randn(p.shape)
            optimizer.step()
        for p, x in zip(params, start, strict=True):
            assert torch.equal(p.detach(), x)
        assert scale is not None or not optimizer.state[params[0]]


@every_policy
@every_row
def test_gradients_and_storage_stay_what_they_are(row: Row, policy):
    (p,), optimizer = fused(row, [torch.randn(13, 5)], False, policy)
    place = p.data_ptr()
    for _ in range(3):
        g = torch.randn(13, 5)
        p.grad = holder = g.clone()
        optimizer.step()
        assert p.grad is holder
        assert torch.equal(holder, g)
    assert p.data_ptr() == place


def test_a_joint_member_without_a_gradient_moves_with_its_spheres_only():
    w, b = nn.Parameter(normal(13, 5)), nn.Parameter(normal(13))
    options = {"sphere": ODD, "joint": True, "radius": "free", "weight_decay": 0.1}
    optimizer = so.SphereSGD([w, b], lr=0.3, momentum=0.9, **options)
    run(optimizer, [w, b], [[normal(13, 5), normal(13)]])
    before, b.grad = b.detach().clone(), None
    w.grad = normal(13, 5)
    optimizer.step()
    moved = b.detach() != before
    on_spheres = torch.ones(13, dtype=torch.bool)
    on_spheres[[0, 9, 12]] = False
    assert torch.equal(moved, on_spheres)


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_ordinary_rows_are_decayed_under_free_as_in_torch(weight_decay):
    start, grads = normal(13, 5), [[normal(13, 5)] for _ in range(10)]
    options = {"lr": 0.1, "weight_decay": weight_decay}
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    run(so.SphereAdam([p], sphere=ODD, radius="free", **options), [p], grads)
    run(torch.optim.AdamW([q], **options), [q], grads)
    for x, y in zip(spheres.rest(p.detach(), ODD), spheres.rest(q.detach(), ODD), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-15)
    if weight_decay:
        with pytest.raises(ValueError, match=r"weight_decay=0.2 does nothing on a sphere of fixed"):
            so.SphereAdam([p], sphere=ODD, **options)


def test_zero_norms_are_counted_over_all_pieces():
    w = torch.randn(13, 5)
    w[:8] = 0  # row 0 is on no sphere: two blocks and one of two rows
    p = nn.Parameter(w)
    with pytest.warns(UserWarning, match=r"'w' of shape \(13, 5\) has 3 of 5 spheres of norm zero"):
        run(so.SphereSGD([("w", p)], lr=0.1, sphere=ODD), [p], [[torch.ones(13, 5)]])
    assert torch.equal(p.detach()[1:8], torch.zeros(7, 5))
    torch.testing.assert_close(p.detach()[0], torch.full((5,), -0.1))


@both_radii
@every_row
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(row: Row, radius):
    start = [torch.randn(13, 4), torch.randn(13)]
    grads = [[torch.randn(13, 4), torch.randn(13)] for _ in range(9)]
    params, optimizer = fused(row, [x.clone() for x in start], True, {"radius": radius})
    run(optimizer, params, grads[:5])
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "opt": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, resumed = fused(row, saved["params"], True, {"radius": radius})
    run(resumed, others, grads[:1])  # state that the checkpoint must replace
    for p, x in zip(others, params, strict=True):
        p.data.copy_(x)
    resumed.load_state_dict(saved["opt"])
    run(optimizer, params, grads[5:])
    run(resumed, others, grads[5:])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(resumed.state[q][key], value), key
            assert resumed.state[q][key].dtype == value.dtype


def test_a_checkpoint_of_other_pieces_is_refused_by_name():
    w = nn.Parameter(torch.randn(12, 4))
    source = so.SphereSGD([("w", w)], lr=0.1, sphere="row@0:4")
    run(source, [w], [[torch.randn(12, 4)]])
    for sphere in ("row@0:5", "row@4:8", "row"):
        target = so.SphereSGD([("w", w)], lr=0.1, sphere=sphere)
        message = f"'w' has sphere='{sphere}' in this optimizer and sphere='row@0:4' in the"
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(source.state_dict())
        assert not target.state
    state = source.state_dict()
    state["state"][0]["radius"] = torch.ones(12)
    with pytest.raises(ValueError, match=r"'w' .* needs radius of shape \(4,\).*has \(12,\)"):
        so.SphereSGD([("w", w)], lr=0.1, sphere="row@0:4").load_state_dict(state)


@pytest.mark.parametrize(
    ("sphere", "message"),
    [
        (
            "row@0:4,row@2:6",
            r"'w' has shape \(8, 3\), but sphere='row@0:4,row@2:6' has pieces that",
        ),
        ("row@4:9", r"'w' has shape \(8, 3\), but sphere='row@4:9' needs a dim 0 of 9 or more"),
        ("block:2@0:3", "sphere='block:2@0:3' needs a number of rows that 2 divides"),
        ("row,tensor@0:4", "'row' needs its rows"),
    ],
)
def test_wrong_pieces_are_refused_by_name(sphere, message):
    w = nn.Parameter(torch.randn(8, 3))
    with pytest.raises(ValueError, match=message):
        so.SphereSGD([("w", w)], sphere=sphere)
    with pytest.raises(ValueError, match=message):
        so.param_groups(nn.ParameterDict({"w": w}), {"w": sphere})


def test_a_sparse_gradient_is_refused_before_anything_changes():
    p, q = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(8, 3))
    optimizer = so.SphereSGD([p, q], lr=0.1, momentum=0.9, sphere="row@0:4")
    p.grad, q.grad = torch.randn(8, 3), torch.randn(8, 3).to_sparse()
    before = p.detach().clone()
    with pytest.raises(SphereError, match="sparse gradient"):
        optimizer.step()
    assert torch.equal(p.detach(), before)
    assert not optimizer.state[p]
