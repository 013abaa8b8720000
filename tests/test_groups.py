"""param_groups: every trainable parameter once, on its sphere or off, under the user's own keys."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import sphereopt as so
from sphereopt.detect import Finding, SphereReport


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)
    )


def shown(groups):
    """Return (names, sphere, kind, weight decay) of every group."""
    return [
        ([n for n, _ in g["params"]], g["sphere"], g.get("kind"), g.get("weight_decay"))
        for g in groups
    ]


def test_dict_report_and_inputs_give_the_same_groups():
    model = net()
    x = torch.randn(6, 3, 3, 3)
    expected = [
        (["0.weight"], "row", "proved", None),
        (["3.weight"], None, None, None),
        (["1.weight", "1.bias", "3.bias"], None, None, 0.0),
    ]
    for given in ({"0.weight": "row"}, so.find_spheres(model, x), x, (x,)):
        assert shown(so.param_groups(model, given)) == expected


def test_every_trainable_parameter_is_there_once_and_the_optimizers_take_the_groups():
    model = net()
    groups = so.param_groups(model, {"0.weight": "row"})
    params = [p for g in groups for _, p in g["params"]]
    assert len(params) == len(set(params)) == len(list(model.parameters()))
    for make in (so.SphereSGD, so.SphereAdam, torch.optim.SGD, torch.optim.AdamW):
        optimizer = make(so.param_groups(model, {"0.weight": "row"}), lr=0.1)
        assert optimizer.param_groups[0]["param_names"] == ["0.weight"]


def test_norm_gains_of_any_rank_are_not_decayed():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.LayerNorm([2, 4, 4]))
    assert shown(so.param_groups(model, {})) == [
        (["0.weight"], None, None, None),
        (["0.bias", "1.weight", "1.bias"], None, None, 0.0),
    ]
    assert shown(so.param_groups(model, {}, decay_norms_and_biases=True)) == [
        (["0.weight", "0.bias", "1.weight", "1.bias"], None, None, None)
    ]


def test_joint_spheres_get_a_group_of_their_own():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 5), nn.LayerNorm(5))
    specs = {("0.weight", "0.bias"): "tensor", ("2.weight", "2.bias"): "tensor"}
    groups = so.param_groups(model, specs)
    joint = [g for g in groups if g["joint"]]
    assert [[n for n, _ in g["params"]] for g in joint] == [[*k] for k in specs]
    optimizer = so.SphereSGD(groups, lr=0.5)
    before = torch.cat([p.detach().flatten() for p in model[0].parameters()]).norm()
    model(torch.randn(7, 4)).pow(3).sum().backward()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model[0].parameters()]).norm()
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("constrain", "sphere"),
    [
        ("3.weight", "tensor"),
        (["3.weight"], "tensor"),
        ("3.w*", "tensor"),
        ("*.weight", "tensor"),
        ({"3.weight": "row"}, "row"),
        (lambda name, p: p.ndim == 2, "tensor"),
        (lambda name, p: "row" if p.ndim == 2 else False, "row"),
    ],
    ids=["name", "names", "glob", "wide-glob", "mapping", "predicate", "predicate-spec"],
)
def test_constrained_weights_are_kept_apart(constrain, sphere):
    groups = so.param_groups(
        nn.Sequential(*net()[:1], nn.Identity(), nn.Flatten(), nn.Linear(8, 4)),
        {"0.weight": "row"},
        constrain=constrain,
    )
    assert shown(groups)[:2] == [
        (["0.weight"], "row", "proved", None),
        (["3.weight"], sphere, "constrained", None),
    ]
    with pytest.raises(ValueError, match=r"'3\.weight' is on a sphere by choice"):
        so.SphereSGD(groups, lr=0.1, radius="free")


def test_a_glob_whose_matches_are_all_proved_adds_nothing():
    """It said that the model had no such parameter."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.LayerNorm(3), nn.Linear(3, 2))
    for pattern in ("0.*", "[0-1].weight*"):
        groups = so.param_groups(
            model, {"0.weight": "tensor", "1.weight": "tensor"}, constrain=pattern
        )
        assert {g["kind"] for g in groups if g["sphere"]} == {"proved"}
    with pytest.raises(ValueError, match=r"no parameter '7\.\*'"):
        so.param_groups(model, {"0.weight": "tensor"}, constrain="7.*")


QKV = "block:2@0:4,row@6:8"


def test_specs_with_pieces_go_wherever_a_spec_goes():
    model = nn.Sequential(nn.Linear(3, 12), nn.Linear(12, 4))
    for specs, constrain, kinds in (
        ({("0.weight", "0.bias"): QKV}, (), ("proved",)),
        ({"0.weight": QKV}, {"1.*ight": "row@1:3"}, ("proved", "constrained")),
        ({}, lambda name, p: QKV if name == "0.weight" else False, ("constrained",)),
    ):
        groups = so.param_groups(model, specs, constrain=constrain)
        on = [g for g in groups if g["sphere"]]
        assert tuple(g["kind"] for g in on) == kinds
        assert [g["sphere"] for g in on] == [QKV, "row@1:3"][: len(on)]
        assert sum(len(g["params"]) for g in groups) == 4
        so.SphereAdam(groups, lr=0.1)
    groups = so.param_groups(model, {}, constrain="0.weight", constrain_sphere=QKV)
    assert groups[0]["sphere"] == QKV
    with pytest.raises(ValueError, match=r"'1\.weight' has shape \(4, 12\), but sphere='row@6:8'"):
        so.param_groups(model, {"1.weight": QKV})


def report(model, specs):
    """Return a report that says so: names of the members, joined by plus signs, to spec."""
    findings = {}
    for names, spec in specs.items():
        members = names.split("+")
        for name in members:
            others = tuple(m for m in members if m != name)
            shape = tuple(model.get_parameter(name).shape)
            findings[name] = Finding(name, shape, spec, others, "proved", None, "")
    return SphereReport(findings)


def test_norm_gains_of_a_report_are_left_out_unless_asked_for():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6))
    found = report(
        model,
        {
            "0.weight+0.bias": "tensor",  # has a bias, and a matrix
            "1.weight+1.bias": "tensor",
            "2.weight": "row@0:3",
            "2.bias": "tensor@0:3",
            "3.weight": "tensor",
        },
    )
    on = [["0.weight", "0.bias"], ["2.weight"]]
    groups = so.param_groups(model, found)
    assert [names for names, sphere, *_ in shown(groups) if sphere] == on
    assert sum(len(g["params"]) for g in groups) == 8
    groups = so.param_groups(model, found, norm_gains=True)
    assert [(names, sphere) for names, sphere, *_ in shown(groups) if sphere] == [
        (["0.weight", "0.bias"], "tensor"),
        (["1.weight", "1.bias"], "tensor"),
        (["2.weight"], "row@0:3"),
        (["2.bias"], "tensor@0:3"),
        (["3.weight"], "tensor"),
    ]
    # What a mapping says is taken: it was written by hand.
    groups = so.param_groups(model, found.spheres)
    assert [names for names, sphere, *_ in shown(groups) if sphere][1] == ["1.weight", "1.bias"]
    # A gain that was left out may still be put on a sphere by choice.
    groups = so.param_groups(model, found, constrain="3.weight")
    assert (["3.weight"], "tensor", "constrained", None) in shown(groups)


def test_a_joint_sphere_of_a_report_with_a_frozen_member_is_left_out():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False))
    found = report(model, {"0.weight+0.bias": "tensor", "2.weight": "row"})
    model[0].bias.requires_grad_(False)
    assert shown(so.param_groups(model, found)) == [
        (["2.weight"], "row", "proved", None),
        (["0.weight"], None, None, None),
        (["1.weight", "1.bias"], None, None, 0.0),
    ]
    with pytest.raises(ValueError, match="frozen and trainable members"):
        so.param_groups(model, found.spheres)


def test_users_groups_keep_their_keys_and_their_order():
    model = net()
    mine = [
        {"params": [*model[3].parameters()], "lr": 0.5, "tag": "head"},
        {"params": [*model[1].named_parameters(), *model[0].named_parameters()], "lr": 0.1},
    ]
    groups = so.param_groups(model, {"0.weight": "row"}, groups=mine)
    assert [(g["lr"], g.get("tag"), g["sphere"]) for g in groups] == [
        (0.5, "head", None),
        (0.5, "head", None),
        (0.1, None, "row"),
        (0.1, None, None),
    ]
    assert [n for n, _ in groups[2]["params"]] == ["0.weight"]
    assert len(mine) == 2
    assert set(mine[0]) == {"params", "lr", "tag"}


def test_frozen_parameters_are_left_out_and_their_spheres_with_them():
    model = net()
    model[0].weight.requires_grad_(False)
    names = [n for g in so.param_groups(model, {"0.weight": "row"}) for n, _ in g["params"]]
    assert "0.weight" not in names
    model[3].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen and trainable members"):
        so.param_groups(model, {("3.weight", "3.bias"): "tensor"})


def test_tied_parameters_appear_once_under_any_of_their_names():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    for name in ("embed.weight", "head.weight"):
        assert shown(so.param_groups(model, {name: "row"})) == [
            (["embed.weight"], "row", "proved", None)
        ]
    with pytest.raises(ValueError, match="given two spheres"):
        so.param_groups(model, {"embed.weight": "row", "head.weight": "row"})


class Compiled(nn.Module):
    """What ``torch.compile`` returns, as far as names go."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled, lambda m: Compiled(Compiled(m))])
def test_wrappers_are_looked_through(wrap):
    model = net()
    wrapped = wrap(model)
    expected = shown(so.param_groups(model, {"0.weight": "row"}))
    assert shown(so.param_groups(wrapped, {"0.weight": "row"})) == expected
    (first,) = [n for n, p in wrapped.named_parameters() if p is model[0].weight]
    assert shown(so.param_groups(wrapped, {first: "row"})) == expected


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_distributed_wrapper_is_looked_through():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = nn.parallel.DistributedDataParallel(model)
    groups = so.param_groups(wrapped, {"module.0.weight": "row"})
    assert groups[0]["params"][0] == ("0.weight", model[0].weight)
    optimizer = so.SphereSGD(groups, lr=0.1, momentum=0.9)
    wrapped(torch.randn(6, 3, 3, 3)).pow(2).sum().backward()
    start = model[0].weight.detach().flatten(1).norm(dim=1)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach().flatten(1).norm(dim=1), start)


@pytest.mark.usefixtures("one_rank")
def test_a_sharded_weight_is_refused_by_name():
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    w = torch.distributed.tensor.distribute_tensor(torch.randn(4, 3), mesh)
    with pytest.raises(TypeError, match=r"'w' is sharded \(DTensor\).*sphere=None"):
        so.SphereSGD([("w", nn.Parameter(w))], sphere="row")


def test_parametrized_weights_answer_to_their_plain_name():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    parametrizations.orthogonal(model[1])
    parametrizations.weight_norm(model[0])
    groups = so.param_groups(model, {"1.weight": "tensor"})
    assert shown(groups)[0][0] == ["1.parametrizations.weight.original"]
    message = r"did you mean '0\.parametrizations\.weight\.original0' or"
    with pytest.raises(ValueError, match=message):
        so.param_groups(model, {"0.weight": "row"})
    groups = so.param_groups(model, {"0.parametrizations.weight.original1": "row"})
    assert shown(groups)[0][1] == "row"


def test_missing_parameters_are_all_named():
    model = net()
    with pytest.raises(ValueError, match=r"2 trainable parameter.*1\.weight, 1\.bias; add them"):
        so.param_groups(
            model, {}, groups=[{"params": [*model[0].parameters(), *model[3].parameters()]}]
        )


@pytest.mark.parametrize(
    ("spheres", "message"),
    [
        ({"0.wieght": "row"}, r"no parameter '0\.wieght'; did you mean '0\.weight'"),
        ({"0.weight": "block:3"}, r"'0\.weight' has shape \(8, 3, 3, 3\), but sphere='block:3'"),
        ({"1.bias": "row"}, r"'1\.bias' has shape \(8,\), but sphere='row' needs two"),
        ({"0.weight": "filter"}, "sphere='filter' is not a sphere spec"),
    ],
    ids=["typo", "block", "bias", "spec"],
)
def test_a_wrong_entry_names_itself(spheres, message):
    with pytest.raises(ValueError, match=message):
        so.param_groups(net(), spheres)


def test_groups_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"tensor of shape \(8, 3, 3, 3\) that is no parameter"):
        so.param_groups(net(), {}, groups=[{"params": list(net().parameters())}])
    model = net()
    twice = [{"params": list(model.parameters())}, {"params": [model[0].weight]}]
    with pytest.raises(ValueError, match=r"'0\.weight' is in two groups"):
        so.param_groups(model, {}, groups=twice)


def test_a_joint_sphere_may_not_be_torn_between_groups():
    model = net()
    mine = [{"params": [model[3].weight]}, {"params": [*model[:3].parameters(), model[3].bias]}]
    with pytest.raises(ValueError, match=r"'3\.weight' is on a joint sphere with 3\.bias"):
        so.param_groups(model, {("3.weight", "3.bias"): "tensor"}, groups=mine)
