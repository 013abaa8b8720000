"""Bad options, parameters and gradients: named, with a remedy, before anything changes."""

import math
import warnings

import pytest
import torch
from torch import nn

import sphereopt as so
from sphereopt.optim import SphereError
from sphereopt.optim.literature import AdamH


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


@pytest.mark.parametrize("fault", ["sparse", "weight decay"])
def test_a_step_that_is_refused_has_changed_no_other_group(fault):
    first, table = nn.Linear(3, 2, bias=False), nn.Embedding(5, 3, sparse=fault == "sparse")
    groups = [{"params": [first.weight]}, {"params": [table.weight]}]
    optimizer = so.SphereSGD(groups, lr=0.1, sphere="row")
    first(table(torch.tensor([1, 2]))).sum().backward()
    if fault == "weight decay":
        optimizer.param_groups[1]["weight_decay"] = 0.1
    before = first.weight.detach().clone()
    with pytest.raises(
        (SphereError, ValueError), match=r"sparse gradient|does nothing on a sphere"
    ):
        optimizer.step()
    assert torch.equal(first.weight.detach(), before)
    assert not optimizer.state[first.weight]


@pytest.mark.parametrize("sphere", [None, "row"])
def test_capturable_is_refused_rather_than_ignored(sphere):
    group = {"params": [nn.Parameter(torch.ones(2, 2))], "capturable": True}
    with pytest.raises(ValueError, match="capturable=True is not supported"):
        so.SphereAdam([group], sphere=sphere)


def test_rounding_of_a_sharded_parameter_is_refused_by_name():
    w = nn.Parameter(torch.ones(2, 2))
    w.placements = ()  # what marks a DTensor
    so.SphereSGD([("w", w)])
    with pytest.raises(TypeError, match=r"'w' is sharded \(DTensor\), and rounding='master'"):
        so.SphereSGD([("w", w)], rounding="master")


def low(params):
    return so.SphereSGD(params, lr=1e-5, sphere="row", rounding="nearest")


WARN = {
    "zero norm": lambda z, w: so.SphereSGD([z], sphere="row").step(),
    "zero norm, published": lambda z, w: AdamH([z]).step(),
    "zero norm, constrained": lambda z, w: so.constrain(
        torch.optim.SGD([("z", z)], lr=0.1), {"z": "row"}
    ),
    "lost step": lambda z, w: low([w]).step(),
    "lost step, closure": lambda z, w: low([w]).step(lambda: 0.0),
}


@pytest.mark.parametrize("make", WARN.values(), ids=WARN)
def test_a_warning_points_to_the_line_of_the_user(make):
    # Through torch's step wrapper, the compiler's, and ours.
    z, w = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.randn(8, 64).bfloat16())
    for p in (z, w):
        p.grad = torch.randn_like(p)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(z, w)
    assert [warning.filename for warning in caught] == [__file__]
