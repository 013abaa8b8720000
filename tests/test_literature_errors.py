"""Bad options, parameters, gradients and checkpoints: named, before anything changes."""

import math

import pytest
import torch
from literature_optimizers import ROWS, Row
from torch import nn

import sphereopt as so
from sphereopt.optim import literature
from sphereopt.optim.base import SphereError

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
ON_SPHERES = [row for row in ROWS if row.name not in ("AdamP", "SGDP")]


def weight():
    return [("w", nn.Parameter(torch.randn(4, 3)))]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("AdamP", {"lr": -1.0}, "lr=-1.0 is out of range"),
        ("AdamH", {"lr": math.nan}, "lr=nan is out of range"),
        ("AdamS", {"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\)"),
        ("AdamP", {"betas": (0.9, 1.0)}, r"betas\[1\]=1.0 is out of range"),
        ("AdamP", {"delta": -0.1}, "delta=-0.1 is out of range"),
        ("SGDP", {"lr": 0.1, "momentum": 1.0}, "momentum=1.0 is out of range"),
        ("AdamG", {"lr": 0.1, "momentum": 1.0}, "momentum=1.0 is out of range"),
        ("AdamG", {"lr": 0.1, "beta2": 1.0}, r"beta2=1.0 is out of range; it must be in \[0, 1\)"),
        ("SGDG", {"lr": 0.1, "grad_clip": -1.0}, "grad_clip=-1.0 is out of range"),
        ("SGDG", {"lr": 0.1, "nesterov": True}, "nesterov=True needs momentum > 0"),
        ("AdamSRT", {"sphere": "filter"}, "'w' has shape .*sphere='filter' is not a sphere spec"),
        ("AdamH", {"sphere": "block:3"}, r"'w' has shape \(4, 3\), but sphere='block:3' needs"),
        ("MuonH", {"sphere": "row@0:2"}, "'w' has shape .*MuonH orthogonalizes whole matrices"),
    ],
    ids=str,
)
def test_bad_options_say_what_to_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(literature, name)(weight(), **options)


@every_row
def test_a_sparse_gradient_is_refused_by_name_before_anything_changes(row: Row):
    first, table = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5, 3))
    optimizer = row.make([("first", first), ("table", table)])
    before = first.detach().clone()
    first.grad = torch.randn(4, 3)
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (5, 3), check_invariants=True)
    with pytest.raises(SphereError, match=r"'table' of shape \(5, 3\) has a sparse gradient"):
        optimizer.step()
    assert torch.equal(first.detach(), before)
    assert not optimizer.state[first]


@every_row
def test_complex_and_integer_weights_are_refused_by_name(row: Row):
    for dtype in (torch.complex64, torch.int64):
        with pytest.raises(TypeError, match=rf"'w' has dtype {dtype}"):
            row.make([("w", torch.ones(2, 2, dtype=dtype))])


@every_row
def test_sharded_weights_are_refused_by_name(row: Row):
    w = nn.Parameter(torch.ones(2, 2))
    w.placements = ()  # what tells a DTensor
    with pytest.raises(TypeError, match="'w' is sharded"):
        row.make([("w", w)])


@pytest.mark.parametrize("row", ON_SPHERES, ids=str)
def test_joint_spheres_are_refused_and_the_group_is_not_kept(row: Row):
    optimizer = row.make(weight())
    params = [("a", nn.Parameter(torch.randn(4, 3))), ("b", nn.Parameter(torch.randn(4, 2)))]
    with pytest.raises(ValueError, match=r"joint=True \('a' and the rest of its group\) is not"):
        optimizer.add_param_group({"params": params, "sphere": "row", "joint": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("row", ON_SPHERES, ids=str)
def test_a_sphere_that_a_group_names_is_taken_at_its_word(row: Row):
    # The constructor's sphere is for matrices, and leaves biases alone.
    bias = ("bias", nn.Parameter(torch.randn(3)))
    with pytest.raises(ValueError, match="'bias' has shape"):
        row.make([{"params": [bias], "sphere": "row"}])
    assert row.make([bias]).sphere_of(bias[1], {"sphere": "row", "sphere_is_default": True}) is None


@pytest.mark.parametrize("name", ["AdamH", "MuonH", "SGDG", "AdamG"])
def test_decay_of_a_fixed_norm_is_refused_and_that_of_other_parameters_is_not(name):
    cls, options = getattr(literature, name), {"lr": 0.1}
    with pytest.raises(ValueError, match=r"weight_decay=0.1 does nothing on a sphere .*'row'"):
        cls([{"params": weight(), "sphere": "row", "weight_decay": 0.1}], **options)
    w, bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.ones(3))
    before = w.detach().clone()
    optimizer = cls([w, bias], weight_decay=0.5, **options)
    w.grad, bias.grad = torch.zeros(4, 3), torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.full((3,), 0.95))
    directions = [torch.nn.functional.normalize(x, dim=1) for x in (w.detach(), before)]
    torch.testing.assert_close(*directions)


@pytest.mark.parametrize("name", ["RotationalAdamW", "RotationalSGD", "RotationalLion"])
def test_req_bug_without_decay_weights_are_ordinary_unless_a_group_says_otherwise(name):
    # The authors' rotational groups stop at an assertion when the decay is 0.
    cls, options = getattr(literature, name), {"lr": 0.1, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="weight_decay=0 turns 'w' and the rest of its group"):
        cls([{"params": weight(), "sphere": "row"}], **options)
    w = nn.Parameter(torch.randn(4, 3))
    before = w.detach().clone()
    optimizer = cls([w], **options)
    assert torch.equal(w.detach(), before)  # and nothing is centered
    w.grad = torch.ones(4, 3)
    optimizer.step()
    torch.testing.assert_close(w.detach(), before - 0.1)


@every_row
def test_one_list_of_groups_serves_several_optimizers(row: Row):
    # torch fills defaults into the caller's groups: the second optimizer would take the first's.
    groups = [
        {"params": weight(), "sphere": "row"},
        {"params": [("b", nn.Parameter(torch.ones(3)))]},
    ]
    row.make(groups, lr=0.5)
    assert set(groups[0]) == {"params", "sphere"}
    assert row.make(groups, lr=0.25).param_groups[1]["lr"] == 0.25


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"params": [("v", nn.Parameter(torch.ones(4, 3)))]}, "it has 'w' where .* has 'v'"),
        ({"params": [("w", nn.Parameter(torch.ones(4, 9)))]}, r"'w' of shape \(4, 9\) has exp_avg"),
        ({"params": [*weight(), ("u", nn.Parameter(torch.ones(2, 2)))]}, "2 here and 1 in the"),
        ({"params": weight(), "sphere": "tensor"}, "'w' has sphere='tensor' in this .*'row' in"),
    ],
    ids=["name", "shape", "count", "sphere"],
)
def test_a_checkpoint_of_other_parameters_is_refused_before_anything_changes(other, message):
    (pair,) = weight()
    source = literature.AdamH([{"params": [pair], "sphere": "row"}])
    pair[1].grad = torch.ones(4, 3)
    source.step()
    target = literature.AdamH([{"sphere": "row", **other}])
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(source.state_dict())
    assert not target.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_of_torch_adamw_continues_in_ordinary_groups(dtype):
    w = nn.Parameter(torch.randn(4, 3).to(dtype))
    source = torch.optim.AdamW([w], lr=0.1)
    w.grad = torch.ones(4, 3, dtype=dtype)
    source.step()
    target = literature.AdamH([{"params": [w], "sphere": None}], betas=(0.9, 0.999))
    target.load_state_dict(source.state_dict())
    twin = nn.Parameter(w.detach().clone())
    reference = torch.optim.AdamW([twin], lr=0.1)
    reference.load_state_dict(source.state_dict())
    twin.grad = w.grad.clone()
    target.step()
    reference.step()
    assert all(x.dtype == torch.float32 for x in target.state[w].values())
    torch.testing.assert_close(w, twin)


def test_spheres_of_a_report_that_are_joint_are_named():
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    groups = so.param_groups(model, {("0.weight", "0.bias"): "tensor"})
    with pytest.raises(ValueError, match=r"'0\.weight' and the rest.*by AdamH"):
        literature.AdamH(groups)
    literature.AdamP(groups)  # which looks at gradients alone
