"""SphereMuon: what is a matrix, what falls back, and torch's own Muon as the other side."""

import pytest
import torch
from small_model import run
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

import sphereopt as so
from sphereopt.geometry import angle, norm
from sphereopt.optim.muon import newton_schulz

NS = ((3.4445, -4.775, 2.0315), 5, 1e-7)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8, 8), (3, 20), (20, 3), (1, 7), (7, 1)])
def test_one_matrix_is_torchs_bit_for_bit_and_a_batch_is_its_matrices(shape):
    x = torch.randn(4, *shape)
    alone = [_zeropower_via_newtonschulz(m, *NS) for m in x]
    for m, expected in zip(x, alone, strict=True):
        assert torch.equal(newton_schulz(m), expected)
    # bfloat16 products may be summed in another order: a few units in the last place.
    torch.testing.assert_close(newton_schulz(x), torch.stack(alone), rtol=0.02, atol=0.01)


def test_the_iteration_keeps_singular_vectors_and_evens_out_singular_values():
    x = torch.randn(12, 30)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    spectrum = torch.linalg.svdvals(newton_schulz(x).float())
    assert s.max() / s.min() > 2
    assert 0.6 < spectrum.min() < spectrum.max() < 1.3
    # A polynomial of x x^T times x has the singular vectors of x; bfloat16 blurs by a percent.
    rotated = u.T @ newton_schulz(x).float() @ v.T
    assert (rotated - rotated.diagonal().diag()).abs().max() < 0.02


def views(w, sphere):
    """Return the matrices that SphereMuon must see, as torch's Muon would be given them."""
    if sphere == "col":
        return [w.transpose(0, 1).flatten(1)]
    if sphere in ("row", "tensor"):
        return [w.flatten(1)]
    blocks = w.chunk(int(sphere.partition(":")[2]))
    expert = blocks[0].shape[0] == 1 and w.ndim > 2
    return [(b[0] if expert else b).flatten(1) for b in blocks]


CASES = [
    ((6, 10), "row"),
    ((6, 10), "tensor"),
    ((6, 3, 2, 2), "row"),
    ((6, 3, 2, 2), "tensor"),
    ((3, 6, 2, 2), "col"),
    ((12, 5), "block:4"),  # heads
    ((4, 6, 5), "block:4"),  # experts: one index of dim 0 each
    ((8, 3, 2, 2), "block:2"),
]


@pytest.mark.parametrize(("shape", "sphere"), CASES, ids=str)
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_free_is_torchs_muon_on_every_matrix(shape, sphere, adjust):
    start, grads = double(*shape), [double(*shape) for _ in range(50)]
    w = nn.Parameter(start.clone())
    ours = so.SphereMuon(
        [w], lr=0.01, sphere=sphere, radius="free", weight_decay=0.1, adjust_lr_fn=adjust
    )
    parts = [nn.Parameter(x.clone()) for x in views(start, sphere)]
    theirs = torch.optim.Muon(parts, lr=0.01, weight_decay=0.1, adjust_lr_fn=adjust)
    for g in grads:
        # The gradient at the stored norm is that at the plain norm, times plain over stored.
        state = ours.state.get(w, {})
        scale = (state["virtual_radius"] / state["radius"]) if state else torch.ones(1).double()
        pick = {"row": 0, "block": 0, "tensor": None, "col": 1}[sphere.partition(":")[0]]
        if pick is None:
            w.grad = g * scale
        else:
            form = [1] * g.ndim
            form[pick] = g.shape[pick]
            w.grad = g * scale.repeat_interleave(g.shape[pick] // len(scale)).reshape(form)
        for part, x in zip(parts, views(g, sphere), strict=True):
            part.grad = x.clone()
        ours.step()
        theirs.step()
    for part, x in zip(parts, views(w.detach(), sphere), strict=True):
        rows = "row" if sphere in ("row", "col") else "tensor"
        # Gradients differ by float64 rounding; where that tips a bfloat16 rounding, an entry of
        # the direction differs by 2**-8, times lr.
        assert angle(x.contiguous(), part.detach(), rows).max() < 4e-5


def test_fixed_turns_every_sphere_by_lr_along_the_orthogonalized_momentum():
    w, grads = nn.Parameter(double(6, 4, 3)), [double(6, 4, 3) for _ in range(50)]
    optimizer = so.SphereMuon([w], lr=0.02, sphere="row", transport="none")
    m = torch.zeros(6, 12).double()
    x, radius = w.detach().flatten(1).clone(), norm(w.detach(), "row")
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
        m = 0.95 * m + 0.05 * g.flatten(1)
        u = _zeropower_via_newtonschulz(0.05 * g.flatten(1) + 0.95 * m, *NS).double()
        t = u - (u * x).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True) * x
        unit = x / x.norm(dim=1, keepdim=True)
        step = t / t.norm(dim=1, keepdim=True)
        x = radius[:, None] * (unit * torch.tensor(0.02).cos() - step * torch.tensor(0.02).sin())
    # float32 cos and sin here; angles of 0.02 over 50 steps.
    torch.testing.assert_close(w.detach().flatten(1), x, rtol=0, atol=1e-5)


def test_experts_do_not_see_each_other():
    start, grads = double(3, 4, 5), [double(3, 4, 5) for _ in range(10)]
    ends = []
    for factor in (1.0, 100.0):
        w = nn.Parameter(start.clone())
        optimizer = so.SphereMuon([w], lr=0.02, sphere="block:3")
        for g in grads:
            w.grad = g * torch.tensor([1.0, factor, 1.0]).double()[:, None, None]
            optimizer.step()
        ends.append(w.detach())
    assert torch.equal(ends[0][::2], ends[1][::2])


def test_what_is_no_matrix_is_adamws_and_named():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "embed": nn.Embedding(5, 4),
            "fc": nn.Linear(4, 4),
        }
    )
    nn.init.normal_(model["norm"].bias)
    specs = {"conv.weight": "row", ("fc.weight", "fc.bias"): "tensor", "norm.bias": "tensor"}
    embed = [model["embed"].weight]
    rest = [p for p in model.parameters() if p is not embed[0]]
    groups = so.param_groups(
        model, specs, groups=[{"params": rest}, {"params": embed, "orthogonalize": False}]
    )
    optimizer = so.SphereMuon(groups, lr=0.01)
    assert sorted(optimizer.fallbacks) == sorted(
        ["conv.bias", "norm.weight", "norm.bias", "fc.weight", "fc.bias", "embed.weight"]
    )
    twins = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    names = ["conv.bias", "norm.weight", "embed.weight"]
    theirs = torch.optim.AdamW([twins[n] for n in names], lr=0.01, weight_decay=0.0)
    for _ in range(5):
        for n, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            twins[n].grad = p.grad.clone()
        optimizer.step()
        theirs.step()
    for n in names:
        assert torch.equal(model.get_parameter(n), twins[n])
    assert "momentum_buffer" in optimizer.state[model["conv"].weight]
    assert "exp_avg_sq" in optimizer.state[model["fc"].weight]


def test_complex_weights_fall_back():
    w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
    ours = so.SphereMuon([w], lr=0.01, sphere="row", transport="project")
    twin = nn.Parameter(w.detach().clone())
    adam = so.SphereAdam([twin], lr=0.01, sphere="row", transport="project")
    for _ in range(5):
        g = torch.randn(4, 3, dtype=torch.complex128)
        run(ours, [w], [[g]])
        run(adam, [twin], [[g]])
    assert ours.fallbacks == ["group 0, parameter 0"]
    torch.testing.assert_close(w.detach(), twin.detach(), rtol=0, atol=1e-14)


def test_channels_last_filters_without_a_sphere_are_torchs_flattened():
    start = torch.randn(6, 4, 3, 3)
    w = nn.Parameter(start.to(memory_format=torch.channels_last, copy=True))
    flat = nn.Parameter(start.flatten(1).clone())
    ours = so.SphereMuon([w], lr=0.01)
    theirs = torch.optim.Muon([flat], lr=0.01, weight_decay=0.0)
    for _ in range(5):
        g = torch.randn(6, 4, 3, 3)
        w.grad, flat.grad = g.to(memory_format=torch.channels_last), g.flatten(1)
        ours.step()
        theirs.step()
    assert torch.equal(w.detach().flatten(1), flat.detach())
    assert w.is_contiguous(memory_format=torch.channels_last)


def test_a_wrong_adjustment_is_refused():
    with pytest.raises(ValueError, match="adjust_lr_fn='big' is none of None, 'original'"):
        so.SphereMuon([nn.Parameter(torch.ones(2, 2))], adjust_lr_fn="big")
