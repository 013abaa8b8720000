"""Every probe against its formula, the calculator and simulation, over whole runs."""

import math

import numpy as np
import pytest
import torch
from optimizers import ROWS
from torch import nn

import sphereopt as so
from sphereopt.monitor import PROBES, window
from sphereopt.monitor.laws import rule_of

LR, DECAY = 0.05, 0.02


def noise(w, generator, size=1.0):
    """Return gradients of norm size/|w| across the rows of w: pure noise on spheres."""
    g = torch.randn(w.shape, generator=generator, dtype=w.dtype)
    g -= (g * w).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True) * w
    return size * g / (g.norm(dim=1, keepdim=True) * w.norm(dim=1, keepdim=True))


def run(make, *, blocks=8, dim=50, steps=40, gradients=None, norm0=1.0, sphere="row", **options):
    """Return rows, and w before, g, w after of every step, of one optimizer on one parameter."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(blocks, dim, generator=generator, dtype=torch.float64)
    w = nn.Parameter(norm0 * w / w.norm(dim=1, keepdim=True))
    optimizer = make([{"params": [("w", w)], "sphere": sphere}])
    rows, seen = [], []
    with so.track(optimizer, rows.append, **options):
        for _ in range(steps):
            with torch.no_grad():
                w.grad = (gradients or noise)(w.detach(), generator)
            before = w.detach().clone()
            optimizer.step()
            seen.append((before.numpy(), w.grad.numpy().copy(), w.detach().clone().numpy()))
    return [row["parameters"]["w"] for row in rows], seen


def generic(w, generator):
    """Return gradients that have nothing to do with the weights."""
    return torch.randn(w.shape, generator=generator, dtype=w.dtype)


def kept(entries, probe, stat="mean"):
    return np.array([entry[probe][stat] for entry in entries])


def inner(x, y):
    return (x * y).sum(axis=1)


def oracle(before, g, after, lr, homogeneity, kappa, alignment):
    """Return every probe of one step, as its docstring has it, in numpy."""
    norm = np.sqrt
    r, u = norm(inner(before, before)), (before - after) / lr
    t = u - (inner(u, before) / r**2)[:, None] * before
    unit, unit_after = before / r[:, None], after / norm(inner(after, after))[:, None]
    apart, along = unit - unit_after, unit + unit_after
    angle = 2 * np.arctan2(norm(inner(apart, apart)), norm(inner(along, along)))
    step = lr * norm(inner(t, t)) / r
    return {
        "norm": norm(inner(after, after)),
        "angle": angle,
        "effective_lr": lr / r ** (1 + homogeneity),
        "relative_update": lr * norm(inner(u, u)) / r,
        "radial_share": inner(u, before) / norm(inner(u, u)) / r,
        "grad_radial_share": inner(g, before) / norm(inner(g, g)) / r,
        "scaled_grad_norm": norm(inner(g, g)) * r,
        "growth": norm(inner(after, after)) / r - 1,
        "growth_law": norm((1 - kappa) ** 2 + alignment * step**2) - 1,
        "momentum_alignment": inner(u, g) / norm(inner(u, u) * inner(g, g)),
        "K_measured": 2 * kappa / angle**2,
    }


TORCH = {
    "sgd": (lambda p: torch.optim.SGD(p, LR, weight_decay=DECAY), 1, LR * DECAY, 1.0),
    "heavy ball": (
        lambda p: torch.optim.SGD(p, LR, momentum=0.9, dampening=0.5, weight_decay=DECAY),
        1,
        LR * DECAY * 5,
        19.0,
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, LR, betas=(0.9, 0.99), weight_decay=DECAY),
        0,
        LR * DECAY,
        None,
    ),
}


@pytest.mark.parametrize("gradients", [noise, generic])
@pytest.mark.parametrize("kind", TORCH)
def test_every_probe_is_its_formula(kind, gradients):
    make, homogeneity, kappa, alignment = TORCH[kind]
    if alignment is None:
        alignment = so.theory.alignment("adamw", betas=(0.9, 0.99))
    entries, seen = run(make, gradients=gradients)
    for entry, (before, g, after) in zip(entries, seen, strict=True):
        want = oracle(before, g, after, LR, homogeneity, kappa, alignment)
        assert set(want) | {"equilibrium_norm", "equilibrium_angle"} == set(PROBES)
        for probe, values in want.items():
            # Shares are differences of products: absolute 1e-12. alignment() is K for little decay.
            rel = 1e-6 if probe == "growth_law" else 1e-9
            got = [entry[probe][key] for key in ("mean", "min", "q25", "median", "q75", "max")]
            quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
            assert got == pytest.approx([values.mean(), *quantiles], rel=rel, abs=1e-12), probe


@pytest.mark.parametrize("row", [x for x in ROWS if x.free and x.entrywise], ids=str)
def test_free_radius_is_logged_as_torch_in_every_probe(row):
    """Numbers of the step on one side, copies around it on the other."""
    logs = []
    for make, more in ((row.make_torch, {}), (row.make, {"radius": "free"})):
        options = {"weight_decay": DECAY, "lr": 0.01, **more}
        entries, _ = run(lambda p, f=make, o=options: f(p, **o), norm0=3.0)
        logs.append(entries)
    for plain, free in zip(*logs, strict=True):
        for probe in set(plain) & set(free) & set(PROBES):
            # Optimizers of our own reference have no class that the tracker knows the scale of.
            if probe == "effective_lr" and row.torch_cls.__module__ != "torch.optim.sgd":
                continue
            assert free[probe] == pytest.approx(plain[probe], rel=1e-7, abs=1e-9), probe
        assert {"norm", "angle", "growth", "grad_radial_share"} <= set(plain) & set(free)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("norm0", [0.7, 1.0, 2.0])
def test_norms_grow_as_the_law_says(momentum, norm0):
    """Exactly without momentum; with it on average, once the buffer has filled."""
    decay = DECAY / 100  # the law has no lag: decay is to be slow against momentum
    hyper = {"lr": LR, "weight_decay": decay, "momentum": momentum}
    settled = so.theory.equilibrium("sgd", **hyper, grad_norm=1.0)
    entries, _ = run(
        lambda p: torch.optim.SGD(p, **hyper),
        blocks=50, dim=200, steps=300, norm0=norm0 * settled.norm,
    )  # fmt: skip
    grown, law = kept(entries, "growth"), kept(entries, "growth_law")
    if momentum == 0:
        assert grown == pytest.approx(law, rel=1e-6, abs=1e-12)
        return
    grown, law = grown[50:], law[50:]
    scale = np.abs(law.mean()) if norm0 != 1 else 10 * LR * decay
    # 50 blocks and 250 steps of noise, of which 19 in a row agree.
    assert abs(grown.mean() - law.mean()) < 0.05 * scale
    assert norm0 == 1 or np.sign(law.mean()) == np.sign(1 - norm0)


SETTLED = [
    ("sgd", lambda p: torch.optim.SGD(p, LR, momentum=0.9, weight_decay=DECAY), {"momentum": 0.9}),
    ("adamw", lambda p: torch.optim.AdamW(p, LR, weight_decay=0.1), {}),
    ("lion", lambda p: so.SphereLion(p, LR, weight_decay=0.1, radius="free"), {}),
    ("muon", lambda p: torch.optim.Muon(p, LR, weight_decay=0.1), {"shape": (40, 50)}),
]


@pytest.mark.parametrize(("rule", "make", "hyper"), SETTLED, ids=[x[0] for x in SETTLED])
def test_the_equilibrium_is_the_calculators(rule, make, hyper):
    muon = rule == "muon"
    entries, seen = run(
        make, blocks=40, steps=5, gradients=lambda w, g: 0.01 * noise(w, g) * torch.rand(
            (len(w), 1), generator=g, dtype=w.dtype
        ), sphere="tensor" if muon else "row",
    )  # fmt: skip
    decay = DECAY if rule == "sgd" else 0.1
    for entry, (before, g, _) in zip(entries, seen, strict=True):
        sizes = np.sqrt(inner(g, g) * inner(before, before)) if rule == "sgd" else [None]
        found = [
            so.theory.equilibrium(
                rule, lr=LR, weight_decay=decay, grad_norm=size, **hyper,
                **({} if muon else {"dim": 50}),
            )
            for size in sizes
        ]  # fmt: skip
        assert entry["equilibrium_angle"]["mean"] == pytest.approx(found[0].angle, rel=1e-9)
        for key, reduce in (("min", np.min), ("mean", np.mean), ("max", np.max)):
            want = reduce([x.norm for x in found])
            assert entry["equilibrium_norm"][key] == pytest.approx(want, rel=1e-9)


def test_at_equilibrium_everything_measured_is_as_predicted():
    hyper = {"lr": LR, "weight_decay": DECAY, "momentum": 0.9}
    settled = so.theory.equilibrium("sgd", **hyper, grad_norm=1.0)
    entries, _ = run(
        lambda p: torch.optim.SGD(p, **hyper), blocks=100, dim=200, steps=700, norm0=settled.norm
    )
    late = entries[100:]
    # 100 blocks over 600 steps: momentum leaves some 30 independent ones of each.
    assert kept(late, "norm").mean() == pytest.approx(settled.norm, rel=0.02)
    assert kept(late, "equilibrium_norm").mean() == pytest.approx(settled.norm, rel=1e-6)
    assert np.sqrt((kept(late, "angle") ** 2).mean()) == pytest.approx(settled.angle, rel=0.02)
    assert kept(late, "K_measured").mean() == pytest.approx(19, rel=0.05)
    assert kept(late, "momentum_alignment").mean() == pytest.approx(math.sqrt(1 - 0.81), rel=0.02)
    turned = [x["diffusive_angle"]["mean"] for x in late if "diffusive_angle" in x]
    assert len(turned) == 6
    assert np.mean(turned) == pytest.approx(settled.diffusive_angle, rel=0.05)


def test_momentum_makes_many_steps_go_further_than_their_angles_say(monkeypatch):
    """On a sphere of fixed radius, where nothing but momentum tells one angle from many."""
    monkeypatch.setattr(window, "SHARE", 1)  # all weights: a small sample would be noise here
    for momentum, alignment in ((0.0, 1.0), (0.9, 19.0)):
        entries, _ = run(
            lambda p, m=momentum: so.SphereSGD(p, 0.003, momentum=m, move="rotate"),
            blocks=50, dim=300, steps=520, every=10, window=250,
        )  # fmt: skip
        turned = np.array([x["diffusive_angle"]["mean"] for x in entries if "diffusive_angle" in x])
        assert len(turned) == 2  # the first sample is taken at step 10
        assert kept(entries, "angle") == pytest.approx(0.003, rel=1e-9)
        # 15,000 weights, and 4 % less for momentum that begins and ends within the window.
        assert ((turned / 0.003) ** 2).mean() == pytest.approx(alignment, rel=0.08)


def test_fixed_spheres_have_no_equilibrium_but_an_angle():
    entries, _ = run(lambda p: so.SphereAdam(p, 0.01))
    assert kept(entries, "growth") == pytest.approx(0.0, abs=0.0)
    assert kept(entries, "equilibrium_angle") == pytest.approx(0.01, rel=1e-12)
    assert not {"equilibrium_norm", "growth_law", "K_measured"} & set(entries[0])


@pytest.mark.parametrize(
    ("optimizer", "options", "missing"),
    [
        (torch.optim.Adam, {"weight_decay": 0.1}, {"equilibrium_norm", "K_measured", "growth_law"}),
        (torch.optim.AdamW, {"amsgrad": True}, {"equilibrium_norm", "K_measured", "growth_law"}),
        (torch.optim.RMSprop, {"weight_decay": 0.1}, {"equilibrium_angle", "growth_law"}),
        (
            so.SphereAdam,
            {"weight_decay": 0.1, "radius": "free", "second_moment": "sphere"},
            {"equilibrium_norm", "K_measured", "growth_law"},
        ),
        (torch.optim.SGD, {"weight_decay": 0.0}, {"equilibrium_angle", "K_measured"}),
        (torch.optim.SGD, {"weight_decay": 30.0}, {"equilibrium_angle", "K_measured"}),
    ],
)
def test_what_the_calculator_does_not_cover_is_left_out(optimizer, options, missing):
    entries, _ = run(lambda p: optimizer(p, LR, **options), steps=3)
    assert not missing & set(entries[-1])
    assert {"norm", "angle", "growth", "scaled_grad_norm"} <= set(entries[-1])


def test_muons_law_is_for_its_matrices_and_not_for_what_adam_steps_beside_them():
    w, v = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(9))
    optimizer, rows = (
        so.SphereMuon([("w", w), ("v", v)], 0.1, 0.1, sphere="tensor", radius="free"),
        [],
    )
    with so.track(optimizer, rows.append):
        w.grad, v.grad = torch.randn(6, 8), torch.randn(9)
        optimizer.step()
    entries = rows[0]["parameters"]
    assert {"equilibrium_norm", "K_measured"} <= set(entries["w"])
    assert not {"equilibrium_norm", "K_measured"} & set(entries["v"])
    settled = so.theory.equilibrium("muon", lr=0.1, weight_decay=0.1, shape=(6, 8))
    assert entries["w"]["equilibrium_norm"]["mean"] == pytest.approx(settled.norm, rel=1e-6)


def test_weights_that_constrain_holds_have_no_growth_to_expect():
    """Torch's step would let them grow; the hooks take that back before the tracker looks."""
    w = nn.Parameter(torch.randn(4, 50, dtype=torch.float64))
    optimizer = torch.optim.SGD([{"params": [("w", w)], "sphere": "row"}], 0.1, momentum=0.9)
    rows, generator = [], torch.Generator().manual_seed(1)  # seed 0 has drawn w
    with so.constrain(optimizer), so.track(optimizer, rows.append):
        for _ in range(20):
            w.grad = noise(w.detach(), generator)
            optimizer.step()
    entry = rows[-1]["parameters"]["w"]
    assert entry["growth"]["max"] == 0
    assert not {"growth_law", "equilibrium_norm", "equilibrium_angle"} & set(entry)
    assert not [x for x in so.report.findings(rows) if x.severity in ("fault", "warning")]


def test_weights_on_spheres_by_choice_get_no_prediction():
    w = nn.Parameter(torch.randn(3, 4))
    group = {"params": [("w", w)], "sphere": "row", "kind": "constrained"}
    rows, optimizer = [], torch.optim.SGD([group], 0.1, weight_decay=0.1)
    with so.track(optimizer, rows.append):
        w.grad = torch.randn(3, 4)
        optimizer.step()
    entry = rows[0]["parameters"]["w"]
    assert entry["kind"] == "constrained"
    assert not {"equilibrium_norm", "equilibrium_angle", "growth_law", "K_measured"} & set(entry)


def test_the_calculators_names_follow_how_decay_acts():
    assert rule_of(torch.optim.Adam, {"decoupled_weight_decay": True}) == "adamw"
    assert rule_of(so.SphereAdam, {"decoupled_weight_decay": False}) == "adam"
    assert rule_of(so.SphereAdam, {}) == "adamw"
    assert rule_of(torch.optim.Adagrad, {}) is None


@pytest.mark.parametrize("maximize", [False, True])
def test_signs_are_those_of_what_is_minimized(maximize):
    for make in (torch.optim.SGD, lambda p, **o: so.SphereSGD(p, radius="free", **o)):
        w = nn.Parameter(torch.tensor([[2.0, 0.0]], dtype=torch.float64))
        optimizer = make([{"params": [("w", w)], "sphere": "row"}], lr=0.1, maximize=maximize)
        rows = []
        with so.track(optimizer, rows.append):
            w.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
            optimizer.step()
        entry, sign = rows[0]["parameters"]["w"], -1 if maximize else 1
        assert entry["grad_radial_share"]["mean"] == pytest.approx(0.6 * sign)
        assert entry["momentum_alignment"]["mean"] == pytest.approx(1.0)
        assert math.copysign(1, entry["growth"]["mean"]) == -sign


def test_angles_of_torchs_steps_are_those_of_float64_clones_at_1e_5_rad():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(64, 576))
    optimizer, rows = torch.optim.SGD([{"params": [("w", w)], "sphere": "row"}], lr=1.0), []
    with so.track(optimizer, rows.append):
        for _ in range(20):
            g, r = torch.randn_like(w), w.detach().norm(dim=1, keepdim=True)
            w.grad = (1e-5 * r / g.norm(dim=1, keepdim=True) * g).detach()
            old = w.detach().double()
            optimizer.step()
            want = so.geometry.angle(old, w.detach().double(), "row")
            assert want.mean() == pytest.approx(1e-5, rel=0.02)
            got = rows[-1]["parameters"]["w"]["angle"]
            for key, value in (("mean", want.mean()), ("min", want.min()), ("max", want.max())):
                assert got[key] == pytest.approx(float(value), rel=1e-6)


def test_angles_from_the_numbers_of_a_step_are_those_of_float64_clones_at_1e_5_rad():
    """In float32, whose arc cosine knows no angle below 3e-4."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(64, 576))
    optimizer, rows = so.SphereSGD([("w", w)], lr=1.0, sphere="row"), []
    with so.track(optimizer, rows.append):
        for _ in range(20):
            g, r = torch.randn_like(w), w.detach().norm(dim=1, keepdim=True)
            w.grad = 1e-5 * r / g.norm(dim=1, keepdim=True) * g
            w.grad = w.grad.detach()
            x, g = w.detach().double().numpy(), w.grad.double().numpy()
            optimizer.step()
            t = g - (inner(x, g) / inner(x, x))[:, None] * x
            want = np.arctan(np.sqrt(inner(t, t) / inner(x, x)))
            assert want.mean() == pytest.approx(1e-5, rel=0.01)
            got = rows[-1]["parameters"]["w"]["angle"]
            assert got["mean"] == pytest.approx(want.mean(), rel=1e-6)
            assert got["min"] == pytest.approx(want.min(), rel=1e-6)
            assert got["max"] == pytest.approx(want.max(), rel=1e-6)
