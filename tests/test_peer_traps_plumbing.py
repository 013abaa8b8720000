"""Traps of other libraries, in options, state, parameters, names and averages."""

import copy
import inspect
import io
import warnings

import geoopt
import pytest
import torch
from literature_optimizers import ROWS as PUBLISHED
from optimizers import ROWS, Row
from peers import peer
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import sphereopt as so
from sphereopt.geometry import exp, log, norm
from sphereopt.optim import literature

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
OURS = [so.SphereSGD, so.SphereAdam, so.SphereLion, so.SphereMuon]
LITERATURE = [getattr(literature, name) for name in literature.__all__]

# What a constructor takes -> a value that is not the default, and what it needs beside it to
# have an effect.
OPTIONS = {
    "lr": (0.02, {}),
    "momentum": (0.6, {}),
    "dampening": (0.3, {"momentum": 0.9}),
    "weight_decay": (0.3, {"radius": "free"}),
    "nesterov": (True, {"momentum": 0.9}),
    "betas": ((0.6, 0.7), {}),
    "beta2": (0.5, {}),
    "eps": (0.5, {"move": "retract", "delta": 9.0}),
    "ns_eps": (5.0, {}),
    "adam_eps": (0.5, {}),
    "rotational_eps": (0.5, {}),
    "amsgrad": (True, {"betas": (0.9, 0.5), "move": "retract"}),
    "decoupled_weight_decay": (False, {"radius": "free", "weight_decay": 0.1}),
    "second_moment": ("sphere", {}),
    "ns_coefficients": ((2.0, -1.5, 0.5), {}),
    "ns_steps": (1, {}),
    "adjust_lr_fn": ("match_rms_adamw", {"move": "retract"}),
    "orthogonalize": (False, {}),
    "delta": (0.9, {}),
    "wd_ratio": (0.9, {"weight_decay": 0.5, "delta": 9.0}),
    "project_buffer": (False, {"momentum": 0.9, "delta": 9.0}),
    "omega": (0.5, {}),
    "grad_clip": (0.1, {}),
    "update_norm_decay_factor": (0.2, {}),
    "zero_mean": (False, {}),
    "sphere": ("tensor", {}),
    "joint": (True, {}),
    "move": ("renorm", {}),
    "radius": ("free", {}),
    "transport": ("parallel", {"momentum": 0.9}),
    "rounding": ("stochastic", {}),
    "maximize": (True, {}),
}
# These act on ordinary parameters only; all others on spheres.
ORDINARY = {
    "SphereMuon": {"betas", "adam_eps"},
    "AdamH": {"weight_decay"},
    "MuonH": {"weight_decay", "betas", "eps"},
    "SGDG": {"weight_decay", "dampening", "nesterov"},
    "AdamG": {"weight_decay", "dampening", "nesterov"},
}
# These say how to compute, not what.
SILENT = {"params", "foreach", "fused", "differentiable"}


def trained(cls, dtype, **options):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    params = [nn.Parameter(x) for x in (draw(4, 6), draw(4, 6), draw(6))]
    ordinary = {"params": [params[2]], "sphere": None, "joint": False}
    if cls in (literature.AdamP, literature.SGDP):
        del options["sphere"]  # they read none
    optimizer = cls([{"params": params[:2]}, ordinary], **options)
    for _ in range(5):
        for p in params:
            p.grad = draw(*p.shape)
        optimizer.step()
    return torch.stack([p.detach() for p in params[:2]]), params[2].detach()


@pytest.mark.parametrize("cls", [*OURS, *LITERATURE], ids=lambda cls: cls.__name__)
def test_no_option_is_accepted_and_ignored(cls):
    # geoopt ignores maximize, McTorch momentum, Cho and Lee's port omega; adamsrt turns one round.
    taken = inspect.signature(cls).parameters
    for option in taken.keys() - SILENT:
        value, needed = OPTIONS[option]
        if isinstance(taken[option].default, bool):
            value = not taken[option].default
        usual = {"lr": 0.05, "sphere": "row"}
        if "zero_mean" in taken:
            usual["weight_decay"] = 0.01
        usual |= {key: x for key, x in needed.items() if key in taken}
        dtype = torch.bfloat16 if option == "rounding" else torch.float64
        place = option in ORDINARY.get(cls.__name__, ())
        with_it = trained(cls, dtype, **usual | {option: value})[place]
        assert not torch.equal(with_it, trained(cls, dtype, **usual)[place]), option


@pytest.mark.parametrize("cls", OURS)
def test_capturable_is_refused_where_it_is_not_served(cls):
    w = nn.Parameter(torch.randn(4, 9))
    with pytest.raises(TypeError, match="capturable"):
        cls([w], sphere="row", capturable=True)
    with pytest.raises(ValueError, match="capturable=True is not supported"):
        cls([{"params": [w], "sphere": "row", "capturable": True}])


@pytest.mark.parametrize(("sphere", "k"), [("row", 4), ("tensor", 1), ("block:2", 2)])
def test_second_moments_are_as_many_as_their_name_says(sphere, k):
    # adamsrt's AdamG has 36 of them in a filter of 36 under channel_wise=True, and one without.
    state = {}
    for second_moment in ("entry", "sphere"):
        w = nn.Parameter(torch.randn(4, 3, 3))
        optimizer = so.SphereAdam([w], sphere=sphere, second_moment=second_moment)
        w.grad = torch.randn(4, 3, 3)
        optimizer.step()
        state[second_moment] = optimizer.state[w]
    assert state["entry"]["exp_avg_sq"].unique().numel() == 36
    assert state["sphere"]["sphere_avg_sq"].shape == (k,)
    assert "exp_avg_sq" not in state["sphere"]


def test_no_sphere_optimizer_decays_by_default():
    for cls in OURS:
        assert inspect.signature(cls).parameters["weight_decay"].default == 0
    for cls in (literature.AdamH, literature.MuonH, literature.SGDG, literature.AdamG):
        assert inspect.signature(cls).parameters["weight_decay"].default == 0


def parameters():
    """Return fan-in one, depthwise 1x1, zeros, equal entries, and noise."""
    return [
        nn.Parameter(x)
        for x in (
            torch.randn(5, 1),
            torch.randn(6, 1, 1, 1),
            torch.zeros(3, 4),
            torch.full((2, 7), 0.9),
            torch.randn(4, 9),
        )
    ]


@pytest.mark.parametrize("row", [*ROWS, *PUBLISHED], ids=str)
def test_construction_changes_no_weight_and_odd_ones_stay_finite(row):
    # REQ centers rows when it is built: the first four become NaN, the last loses 23 %.
    params = parameters()
    before = [p.detach().clone() for p in params]
    options = {"zero_mean": False} if row.name.startswith("Rotational") else {}
    optimizer = row.make(params, **options, **({"sphere": "row"} if isinstance(row, Row) else {}))
    for p, x in zip(params, before, strict=True):
        assert torch.equal(p.detach(), x)
    keeps = isinstance(row, Row) or row.keeps_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the norms of zero; another test has those
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)
    if keeps:
        for p, x in zip(params, before, strict=True):
            torch.testing.assert_close(norm(p.detach(), "row"), norm(x, "row"))


def test_req_bug_the_first_norms_are_those_of_the_default_with_centering_too():
    # Centering is the published default, and the one constructor here that writes to weights.
    writes = []
    for cls in [*OURS, *LITERATURE]:
        w = nn.Parameter(torch.randn(4, 9))
        before = w.detach().clone()
        needs = {k: 0.01 for k in ("lr", "weight_decay") if k in inspect.signature(cls).parameters}
        cls([w], **(needs if cls in LITERATURE else {"sphere": "row"}))
        if not torch.equal(w.detach(), before):
            writes.append(cls.__name__)
            torch.testing.assert_close(norm(w.detach(), "row"), norm(before, "row"))
            assert "changes the weights" in cls.__doc__
    assert writes == ["RotationalAdamW", "RotationalLion", "RotationalSGD"]


def test_geoopt_projects_zero_to_nan_and_zero_is_a_point_that_stays_here():
    zero, v = torch.zeros(3, 4), torch.randn(3, 4)
    for result in (so.geometry.tangent(zero, v, "row"), exp(zero, v, "row"), log(zero, v, "row")):
        assert torch.isfinite(result).all()
    assert torch.equal(so.geometry.retract(zero, v, "row"), zero)
    with peer("geoopt", "0.5.1"):
        assert geoopt.Sphere().projx(zero).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_geoopt_has_no_exponential_map_in_half_precision_and_we_have(dtype):
    w = nn.Parameter(torch.randn(4, 64).to(dtype))
    start = w.detach().clone()
    optimizer = so.SphereSGD([w], lr=0.05, momentum=0.9, sphere="row", move="exp")
    for _ in range(50):
        w.grad = torch.randn(4, 64).to(dtype)
        optimizer.step()
    drift = norm(w.detach(), "row") / norm(start, "row") - 1
    # 64 independent roundings of eps/2 or less.
    assert drift.abs().max() < torch.finfo(dtype).eps
    x = start / norm(start, "row")[:, None].to(dtype)
    with peer("geoopt", "0.5.1"), pytest.raises(KeyError):
        geoopt.SphereExact().expmap(x, torch.zeros_like(x))


def network():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, eps=1e-30), nn.ReLU(), nn.Linear(8, 3)
    ).double()


def train(model, optimizer, steps, also=lambda: None):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
        also()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("radius", ["fixed", "free"])
@every_row
def test_state_is_tensors_and_goes_through_distributed_checkpoints_bit_for_bit(
    row: Row, radius, flat
):
    # adamsrt keeps a list and a torch.Size; a flag in Python would be lost, and the norm retaken.
    model = network()
    optimizer = row.make(so.param_groups(model, {"0.weight": "row"}), radius=radius)
    train(model, optimizer, 7)
    for state in optimizer.state.values():
        assert all(isinstance(x, torch.Tensor) for x in state.values() if x is not None)
    # torch asks for strict=False where a parameter has no state, as in SGD without momentum.
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat, strict=row.name != "sgd")
    file = io.BytesIO()
    torch.save(dcp.get_state_dict(model, optimizer, options=options), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    fresh = network()
    resumed = row.make(so.param_groups(fresh, {"0.weight": "row"}), radius=radius)
    dcp.set_state_dict(
        fresh, resumed, model_state_dict=weights, optim_state_dict=state, options=options
    )
    for net, opt in ((model, optimizer), (fresh, resumed)):
        train(net, opt, 5)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)


def test_geoopt_parameters_cannot_be_loaded_as_weights_and_ours_are_torchs_own():
    model = network()
    optimizer = so.SphereAdam(so.param_groups(model, {"0.weight": "row"}), lr=0.1)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(list(model.parameters()), file)
    file.seek(0)
    for p, q in zip(torch.load(file, weights_only=True), model.parameters(), strict=True):
        assert type(p) is type(q) is nn.Parameter
        assert torch.equal(p, q)
        assert not q.__dict__
    with peer("geoopt", "0.5.1"):
        file = io.BytesIO()
        torch.save(geoopt.ManifoldParameter(torch.eye(2), manifold=geoopt.Sphere()), file)
        file.seek(0)
        with pytest.raises(Exception, match=r"[Ww]eights_only|WeightsUnpickler"):
            torch.load(file, weights_only=True)


def test_a_module_is_neither_hooked_nor_changed_by_its_forward():
    # EDM2 normalizes stored weights in every forward; a parametrization recomputes at each access.
    model, untouched = network(), network()
    optimizer = so.SphereAdam(so.param_groups(model, {"0.weight": "row"}), lr=0.1)
    x = torch.randn(16, 6, dtype=torch.float64)
    with so.track(optimizer, [].append):
        for module, other in zip(model.modules(), untouched.modules(), strict=True):
            assert module.__dict__.keys() == other.__dict__.keys()
            hooks = [v for k, v in module.__dict__.items() if "hooks" in k]
            assert not any(hooks)
            assert type(module) is type(other)
        before = copy.deepcopy(dict(model.named_parameters()))
        for _ in range(3):
            model(x).sum().backward()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name])
            assert p.is_leaf
    assert model.state_dict().keys() == untouched.state_dict().keys()


class Misnamed(nn.Module):
    """A convolution and a packed-looking linear, each before a norm, under any names."""

    def __init__(self, names):
        super().__init__()
        parts = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 12, bias=False)]
        for name, part in zip(names, [*parts, nn.BatchNorm1d(12), nn.Linear(12, 2)], strict=True):
            self.add_module(name, part)
        self.names = names

    def forward(self, x):
        conv, one, linear, two, head = (getattr(self, name) for name in self.names)
        return head(two(linear(one(conv(x)).relu().mean((2, 3)))).relu())


def test_names_and_shapes_decide_nothing():
    # marin took "attn_gated_norm" for "attn_gate"; AngularMuown takes 3n x n for a packed QKV;
    # levanter makes spheres of the rows of 4-dimensional weights and not of matrices.
    plain = ["conv", "norm", "linear", "norm2", "head"]
    odd = ["lm_head", "attn_gate", "embedding", "attn_gated_norm", "router"]
    x, found = torch.randn(8, 3, 6, 6), []
    for names in (plain, odd):
        torch.manual_seed(3)
        report = so.find_spheres(Misnamed(names), x)
        assert report.spheres[f"{names[0]}.weight"] == report.spheres[f"{names[2]}.weight"] == "row"
        assert report[f"{names[4]}.weight"].sphere is None
        found.append([(f.sphere, f.status, f.shape) for f in report.values()])
    assert found[0] == found[1]
    # Without a report or a spec nothing is on a sphere, whatever its name.
    groups = so.SphereSGD(Misnamed(odd).named_parameters(), lr=0.1).param_groups
    assert [group["sphere"] for group in groups] == [None]


def test_averages_leave_the_sphere_and_come_back_without_a_change_of_function():
    model = network()
    x = torch.randn(64, 6, dtype=torch.float64)
    report = so.find_spheres(model, x)
    optimizer = so.SphereAdam(so.param_groups(model, report), lr=0.1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    train(model, optimizer, 60, also=lambda: averaged.update_parameters(model))
    w, a = model[0].weight.detach(), averaged.module[0].weight.detach()
    assert (norm(a, "row") < 0.97 * norm(w, "row")).all()
    before, head = averaged(x), averaged.module[3].weight.detach().clone()
    update_bn([x], averaged)
    refreshed = averaged.eval()(x)
    for name, sphere in report.spheres.items():
        if isinstance(name, str):
            point, mean = model.get_parameter(name), averaged.module.get_parameter(name)
            mean.data.copy_(exp(point.data, log(point.data, mean.data, sphere), sphere))
    torch.testing.assert_close(norm(a, "row"), norm(w, "row"), rtol=1e-12, atol=0)
    torch.testing.assert_close(averaged.train()(x), before, rtol=1e-10, atol=1e-12)
    # Running statistics are of the shorter weights until they are taken anew.
    assert (averaged.eval()(x) - refreshed).abs().max() > 1e-3
    update_bn([x], averaged)
    torch.testing.assert_close(averaged.eval()(x), refreshed, rtol=1e-10, atol=1e-12)
    # What is not invariant is left alone: its average's norm is part of the function.
    assert "3.weight" not in report.spheres
    assert torch.equal(averaged.module[3].weight, head)


class Frozen(nn.BatchNorm1d):
    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)


def test_the_report_measures_what_makes_invariance_approximate():
    x = torch.randn(32, 6)
    layers = [nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)]
    evidence = so.find_spheres(nn.Sequential(*layers), x)["0.weight"].evidence
    layers[0].weight.data.mul_(1e-3)  # the variance is now below the eps of the norm
    small = so.find_spheres(nn.Sequential(*layers), x)
    assert evidence.at_real_eps < 1e-3 < 0.1 < small["0.weight"].evidence.at_real_eps
    assert "!" in str(small)
    # A bias in front of a LayerNorm is half of what is invariant; in front of a BatchNorm, nothing.
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    assert so.find_spheres(model, x)["0.weight"].joint == ("0.bias",)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert so.find_spheres(model, x)["0.bias"].status == "inert"
    # Statistics that are no longer the batch's leave nothing invariant in their weights.
    frozen = nn.Sequential(nn.Linear(6, 8, bias=False), Frozen(8), nn.Linear(8, 3))
    assert so.find_spheres(frozen, x)["0.weight"].status == "none"
