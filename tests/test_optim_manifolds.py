"""geoopt's ManifoldParameters in our optimizers: which groups they get, and where they go."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import geoopt
import pytest
import torch
from torch import Tensor, nn

import sphereopt as so
from sphereopt import geometry
from sphereopt.manifold import Spheres
from sphereopt.optim._manifolds import split_manifolds

ROOT = Path(__file__).parent.parent


def on(manifold, *shape: int) -> geoopt.ManifoldParameter:
    start = torch.randn(*shape, dtype=torch.float64)
    return geoopt.ManifoldParameter(manifold.projx(start), manifold=manifold)


def summary(groups):
    return [([tuple(p.shape) for p in g["params"]], g.get("sphere")) for g in groups]


# Trajectories


@pytest.mark.parametrize("shape", [(5, 7), (9,), (1, 4)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_goes_where_riemannian_sgd_goes(shape, momentum, nesterov):
    if nesterov and not momentum:
        return
    options = {"lr": 0.05, "momentum": momentum, "nesterov": nesterov}
    p = on(geoopt.Sphere(), *shape)
    twin = copy.deepcopy(p)
    ours = so.SphereSGD([p], move="retract", transport="project", **options)
    theirs = geoopt.optim.RiemannianSGD([twin], **options)
    if momentum:
        # geoopt would start it with the raw gradient, and make a first step 1+momentum too long.
        theirs.state[twin]["momentum_buffer"] = torch.zeros_like(twin)
    start = p.detach().clone()
    for _ in range(60):  # generic gradients, with radial parts
        p.grad = torch.randn(shape, dtype=torch.float64) - 0.5 * p.detach()
        twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
    # Sixty steps of roundings of 1e-16 each, carried along.
    torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-12, atol=1e-12)
    assert geometry.angle(start, p.detach(), "row" if len(shape) > 1 else "tensor").min() > 0.1


def test_the_exponential_move_goes_where_sphere_exact_goes():
    p = on(geoopt.SphereExact(), 4, 6)
    twin = copy.deepcopy(p)
    ours = so.SphereSGD([p], lr=0.3, move="exp")
    theirs = geoopt.optim.RiemannianSGD([twin], lr=0.3)
    for _ in range(60):
        p.grad = torch.randn(4, 6, dtype=torch.float64)
        twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [so.SphereSGD, so.SphereAdam])
def test_our_spheres_move_as_the_same_spec_on_a_plain_parameter(cls):
    p = on(Spheres("block:2", torch.tensor([1.0, 3.0])), 6, 5)
    plain = nn.Parameter(p.detach().as_subclass(Tensor).clone())
    ours = cls([p], lr=0.02)
    theirs = cls([plain], lr=0.02, sphere="block:2")
    for _ in range(50):
        p.grad = torch.randn(6, 5, dtype=torch.float64)
        plain.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(p.detach().as_subclass(Tensor), plain.detach())
    assert p.manifold.check_point_on_manifold(p, rtol=1e-12, atol=0)


# Groups


def test_what_has_no_manifold_passes_through_as_the_same_object():
    layer = nn.Linear(3, 2)
    groups = [{"params": list(layer.parameters()), "lr": 0.1}]
    for given in (
        [*layer.parameters()],
        tuple(layer.named_parameters()),
        groups,
        groups[0],
        layer.weight,
        [],
        [geoopt.ManifoldParameter(torch.ones(3))],  # Euclidean
    ):
        assert split_manifolds(given) is given
    assert groups[0].keys() == {"params", "lr"}


def test_iterators_lose_nothing_by_being_looked_at():
    layer = nn.Linear(3, 2)
    found = split_manifolds(layer.named_parameters())
    assert [name for name, _ in found] == ["weight", "bias"]
    given = {"params": layer.parameters(), "lr": 0.1}
    (group,) = split_manifolds(iter([given]))
    assert [id(p) for p in group["params"]] == [id(p) for p in layer.parameters()]
    assert group["lr"] == 0.1
    optimizer = so.SphereSGD(layer.parameters(), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_spheres_get_groups_of_their_own_with_their_groups_keys():
    ordinary, flat = nn.Parameter(torch.ones(3)), geoopt.ManifoldParameter(torch.ones(2))
    vector, matrix, deep = (on(geoopt.Sphere(), *shape) for shape in ((4,), (3, 4), (3, 1, 4)))
    heads = on(Spheres("block:2"), 4, 3)
    found = split_manifolds(
        [
            {"params": iter([ordinary, vector, matrix, flat]), "lr": 0.1},
            {"params": heads, "lr": 0.2},
            {"params": [deep], "kind": "proved", "sphere": "row"},
        ]
    )
    assert summary(found) == [
        ([(3,), (2,)], None),
        ([(4,)], "tensor"),
        ([(3, 4)], "row"),
        ([(4, 3)], "block:2"),
        ([(3, 1, 4)], "row"),
    ]
    assert [g.get("lr") for g in found] == [0.1, 0.1, 0.1, 0.2, None]
    assert [g.get("kind") for g in found] == [None, *["constrained"] * 3, "proved"]
    assert "sphere" not in found[0]


def test_names_stay_with_their_parameters():
    p, q = on(geoopt.Sphere(), 3, 4), nn.Parameter(torch.ones(2))
    found = split_manifolds([("q", q), ("p", p)])
    assert [g["params"] for g in found] == [[("q", q)], [("p", p)]]
    found = split_manifolds([{"params": [p, q], "param_names": ["p", "q"]}])
    assert [g["param_names"] for g in found] == [["q"], ["p"]]
    optimizer = so.SphereSGD([("q", q), ("p", p)], lr=0.1)
    assert [g["param_names"] for g in optimizer.param_groups] == [["q"], ["p"]]


@pytest.mark.parametrize(
    ("make", "keys", "message"),
    [
        (lambda: on(geoopt.Stiefel(), 4, 2), {}, "Stiefel.*leave it to an optimizer of geoopt"),
        (lambda: on(geoopt.Sphere(), 2, 3, 4), {}, r"leading dimensions merged, as \(6, 4\)"),
        (
            lambda: on(geoopt.Sphere(intersection=torch.eye(4, dtype=torch.float64)[:, :2]), 3, 4),
            {},
            "within a subspace",
        ),
        (lambda: on(geoopt.Scaled(geoopt.Sphere(), 2.0), 3, 4), {}, "Scaled"),
        (
            lambda: geoopt.ManifoldParameter(2 * torch.eye(3), manifold=geoopt.Sphere()),
            {},
            r"not on its manifold .*proj_\(\)",
        ),
        (lambda: on(geoopt.Sphere(), 3, 4), {"joint": True}, "joint=True"),
        (lambda: on(geoopt.Sphere(), 3, 4), {"sphere": "tensor"}, "sphere='row'.*sphere='tensor'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, keys, message):
    p = make()
    with pytest.raises(ValueError, match=rf"(?s)parameter 'net.w'.*{message}"):
        split_manifolds([{"params": [("net.w", p)], **keys}])
    with pytest.raises(ValueError, match=r"parameter 'group 0\[1\]'"):
        split_manifolds([{"params": [nn.Parameter(torch.ones(2)), p], **keys}])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_point_is_on_its_manifold_to_the_rounding_of_its_dtype(dtype):
    p = geoopt.ManifoldParameter(geoopt.Sphere().projx(torch.randn(8, 200).to(dtype)))
    p.manifold = geoopt.Sphere()
    assert summary(split_manifolds([p])) == [([(8, 200)], "row")]


# The page


BLOCKS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/manifold.md").read_text(), flags=re.DOTALL
)


@pytest.mark.parametrize("number", [2, 3])
def test_the_code_of_the_page_runs(number):
    names = {"torch": torch, "so": so, "model": nn.Linear(3, 2)}
    for block in BLOCKS[:number]:
        exec(block, names)
    assert len(names["sampler"].log_probs) == 10


@pytest.mark.parametrize("cls", [so.SphereSGD, so.SphereAdam, so.SphereLion, so.SphereMuon])
def test_optimizers_take_manifold_parameters_as_they_come(cls):
    # Users of other libraries found out late that theirs had been plain parameters all along.
    p, w = on(geoopt.Sphere(), 5, 7), nn.Parameter(torch.randn(3))
    ours = cls(iter([("w", w), ("p", p)]), lr=0.02)
    assert summary(ours.param_groups) == [([(3,)], None), ([(5, 7)], "row")]
    assert [g["param_names"] for g in ours.param_groups] == [["w"], ["p"]]
    for _ in range(20):
        p.grad, w.grad = torch.randn(5, 7, dtype=torch.float64), torch.randn(3)
        ours.step()
    assert (p.detach().norm(dim=1) - 1).abs().max() < 1e-14
    late = on(geoopt.SphereExact(), 6)
    ours.add_param_group({"params": [("late", late)]})
    assert ours.param_groups[-1]["sphere"] == "tensor"


def test_a_manifold_that_is_refused_leaves_the_optimizer_as_it_was():
    ours = so.SphereSGD([("w", nn.Parameter(torch.randn(3)))], lr=0.02)
    bad = geoopt.ManifoldParameter(torch.eye(3), manifold=geoopt.Stiefel())
    good = on(geoopt.Sphere(), 6)
    with pytest.raises(ValueError, match=r"parameter 'bad' .* is on geoopt's manifold Stiefel"):
        ours.add_param_group({"params": [("good", good), ("bad", bad)]})
    assert len(ours.param_groups) == 1
