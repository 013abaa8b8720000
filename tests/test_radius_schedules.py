"""Schedules of the radius, against runs of torch.optim and against schedules of lr."""

import copy
import io
import math

import pytest
import torch
from small_model import continue_training, model_and_groups, run
from test_constrain import gradients, named, weights
from test_optim_torch import batches, small_net
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import sphereopt as so
from sphereopt.geometry import angle, norm
from sphereopt.optim import SphereAdam, SphereSGD
from sphereopt.optim.constrain import constrain
from sphereopt.optim.schedules import RadiusReplay, RadiusSchedule

STEPS = 120
SPHERES = {"0.weight": "row", "3.weight": "row"}
ADAM = {"eps": 1e-30}  # leaves the gradient's scale no effect at all


def constant(step):
    return 1.0


def cosine(step):
    return 0.55 + 0.45 * math.cos(math.pi * step / STEPS)


def drop(step):
    return 1.0 if step < 50 else 0.1


def batch_norm_net(decay, on_spheres):
    # eps makes the network not quite invariant; 1e-30 leaves rounding as the only difference.
    torch.manual_seed(5)
    model = small_net("batch", 1e-30).double()
    groups = so.param_groups(model, SPHERES)
    for group in groups:
        group.setdefault("weight_decay", decay if on_spheres or group["sphere"] is None else 0.0)
    return model, groups


def train(model, optimizer, lr_factor, schedule=None):
    """Return the spheres' weights after every step."""
    path, scheduler = [], LambdaLR(optimizer, lr_factor)
    for x, y in batches(STEPS, torch.float64):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        if schedule is not None:
            schedule.step()
        path.append([model[i].weight.detach().clone() for i in (0, 3)])
    return path


def apart(one, two):
    """Return the largest angle between two runs, over all steps and spheres."""
    pairs = [(w, v) for ws, vs in zip(one, two, strict=True) for w, v in zip(ws, vs, strict=True)]
    return max(float(angle(w, v, "row").max()) for w, v in pairs)


# Every pair is one run under a schedule of lr at a fixed radius, and one of the radius.
EXACT = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.05, "momentum": 0.9}),
    ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    ("sgd", {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    ("adam", {"lr": 0.01, **ADAM}),
    ("adam", {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.9), **ADAM}),
]
CLASSES = {"sgd": SphereSGD, "adam": SphereAdam}


def scheduled(name, options, lr_factor, **settings):
    """Return how far apart a schedule of lr and the one of the radius are, in radians."""
    cls = CLASSES[name]
    model, groups = batch_norm_net(0.0, on_spheres=True)
    fixed = cls(groups, move="renorm", transport="none", **options)
    reference = train(model, fixed, lr_factor)
    model, groups = batch_norm_net(0.0, on_spheres=True)
    optimizer = cls(groups, radius="free", **options)
    for group in optimizer.param_groups:  # lr goes on being scheduled where there is no sphere
        group["scheduled"] = group["sphere"] is None
    schedule = RadiusSchedule.from_lr(optimizer, lr_factor, **settings)
    factors = [lr_factor if g["scheduled"] else constant for g in optimizer.param_groups]
    return apart(reference, train(model, optimizer, factors, schedule))


@pytest.mark.parametrize("lr_factor", [cosine, drop])
@pytest.mark.parametrize(("name", "options"), EXACT)
def test_a_schedule_of_the_radius_is_the_schedule_of_lr(name, options, lr_factor):
    assert scheduled(name, options, lr_factor) < 1e-10


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SphereSGD, {"lr": 0.05, "momentum": 0.9}),
        (SphereAdam, {"lr": 0.01, **ADAM}),
        (SphereAdam, {"lr": 0.01, "second_moment": "sphere", **ADAM}),
        (so.SphereLion, {"lr": 0.01}),
    ],
)
def test_on_joint_spheres_and_generic_gradients_too(cls, options):
    shapes, ends = [(4, 5), (4,)], []
    for free in (False, True):
        params = weights(*shapes)
        group = {"params": named(params), "sphere": "row", "joint": True}
        policy = {"radius": "free"} if free else {"move": "renorm", "transport": "none"}
        optimizer = cls([group], **policy, **options)
        schedule = RadiusSchedule.from_lr(optimizer, drop) if free else LambdaLR(optimizer, drop)
        for g in gradients(shapes, steps=STEPS):
            run(optimizer, params, [g])
            schedule.step()
        ends.append(torch.cat([params[0].detach(), params[1].detach()[:, None]], dim=1))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-11)
    assert angle(*ends, "row").max() < 1e-10


@pytest.mark.parametrize(
    ("name", "options", "exact"),
    [
        ("sgd", {"lr": 0.1}, True),
        ("sgd", {"lr": 0.05, "momentum": 0.9}, False),
        ("adam", {"lr": 0.01, **ADAM}, False),
    ],
)
def test_without_rescaled_moments_it_is_only_for_sgd_without_momentum(name, options, exact):
    off = scheduled(name, options, drop, rescale_moments=False)
    assert off < 1e-10 if exact else off > 1e-3


def test_held_sgd_under_a_schedule_of_lr_is_the_schedule_of_the_radius_too():
    # The same once more without any of our steps in the reference: torch's SGD, retracted.
    options = {"lr": 0.05, "momentum": 0.9}
    model, groups = batch_norm_net(0.0, on_spheres=True)
    held = torch.optim.SGD(groups, **options)
    with constrain(held, project=False):
        reference = train(model, held, cosine)
    model, groups = batch_norm_net(0.0, on_spheres=True)
    optimizer = SphereSGD(groups, radius="free", **options)
    schedule = RadiusSchedule(optimizer, lambda t: cosine(t) ** -0.5)
    factors = [cosine if g["sphere"] is None else constant for g in optimizer.param_groups]
    assert apart(reference, train(model, optimizer, factors, schedule)) < 1e-10


def test_the_stored_weights_keep_their_norm_and_the_believed_one_is_the_function():
    model, groups = model_and_groups()
    optimizer = SphereSGD(groups, lr=0.1, momentum=0.9, radius="free")
    w = model[0].weight
    before = norm(w.detach(), "row")
    continue_training(model, optimizer, 3)
    start = optimizer.state[w]["virtual_radius"].clone()
    assert (start / before - 1).abs().min() > 1e-4
    schedule = RadiusSchedule(optimizer, lambda t: 1 + 0.1 * t)
    for t in range(20):
        assert schedule.last_step == t
        torch.testing.assert_close(optimizer.state[w]["virtual_radius"], (1 + 0.1 * t) * start)
        continue_training(model, optimizer, 1)
        schedule.step()
    torch.testing.assert_close(norm(w.detach(), "row"), before, rtol=3e-7, atol=0)


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def schedule_of(kind, optimizer):
    if kind == "replay":
        norms = {"0.weight": torch.linspace(1, 2, 160).reshape(20, 8)}
        norms["3.weight + 3.bias"] = torch.linspace(2, 1, 20)[:, None]
        return RadiusReplay(optimizer, norms, weight_decay=0.1)
    return RadiusSchedule(optimizer, lambda t: 1.3 + math.sin(t))


def advance(model, optimizer, schedule, steps):
    for _ in range(steps):
        continue_training(model, optimizer, 1)
        schedule.step()


@pytest.mark.parametrize("cls", [SphereSGD, SphereAdam])
@pytest.mark.parametrize("kind", ["replay", "schedule"])
@pytest.mark.parametrize("before_the_schedule_stepped", [False, True])
def test_resuming_is_exact_bit_for_bit(kind, cls, before_the_schedule_stepped):
    runs = []
    for scale in (1.0, 1.7):
        model, groups = model_and_groups()
        with torch.no_grad():
            model[0].weight.mul_(scale)  # another radius to begin with, which must be replaced
        optimizer = cls(groups, lr=0.01, radius="free")
        runs.append((model, optimizer, schedule_of(kind, optimizer)))
    (model, optimizer, schedule), (fresh, resumed, other) = runs
    advance(model, optimizer, schedule, 6)
    continue_training(model, optimizer, 1)
    if not before_the_schedule_stepped:
        schedule.step()
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    saved = through_file({name: part.state_dict() for name, part in parts.items()})
    schedule.step()
    advance(fresh, resumed, other, 3)  # what the checkpoint must replace
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["schedule"])
    assert other.last_step == schedule.last_step == 7
    advance(model, optimizer, schedule, 5)
    advance(fresh, resumed, other, 5)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(resumed.state[q][key], value), key


@pytest.mark.parametrize("kind", ["replay", "schedule"])
def test_a_step_that_the_grad_scaler_left_out_does_not_advance(kind):
    model, groups = model_and_groups()
    optimizer = SphereSGD(groups, lr=0.01, momentum=0.9, radius="free")
    schedule = schedule_of(kind, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for t in range(6):
        for p in model.parameters():
            p.grad = torch.full_like(p, torch.inf if t % 2 else 1.0)
        before = copy.deepcopy(optimizer.state[model[0].weight])
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if t % 2:
            for key, value in before.items():
                assert torch.equal(optimizer.state[model[0].weight][key], value), key
    assert schedule.last_step == 3


def test_groups_are_chosen_by_number_and_pieces_leave_the_other_rows_alone():
    ours, theirs = weights((6, 5), (4, 5)), weights((6, 5), (4, 5))
    ends = []
    for params, schedules in ((ours, True), (theirs, False)):
        spec = {"sphere": "row@1:4", "radius": "free"}
        groups = [{"params": [("a", params[0])], **spec}, {"params": [("b", params[1])], **spec}]
        optimizer = SphereSGD(groups, lr=0.1, momentum=0.9)
        schedule = RadiusSchedule(optimizer, lambda t: 2.0 + t, groups=[0]) if schedules else None
        for g in gradients([(6, 5), (4, 5)], steps=10):
            run(optimizer, params, [g])
            if schedule is not None:
                schedule.step()
        ends.append(optimizer.state)
    rest = [0, 4, 5]
    assert torch.equal(ours[0][rest], theirs[0][rest])
    assert torch.equal(ours[1], theirs[1])
    assert angle(ours[0].detach(), theirs[0].detach(), "row@1:4").min() > 1e-2
    moments = [
        state[p[0]]["momentum_buffer"] for state, p in zip(ends, (ours, theirs), strict=True)
    ]
    assert torch.equal(moments[0][rest], moments[1][rest])


def test_what_cannot_be_scheduled_is_refused_by_name():
    (w,) = weights((4, 5))
    free = SphereSGD([("w", w)], lr=0.1, sphere="row", radius="free")
    with pytest.raises(TypeError, match=r"SGD knows one norm.*radius='free'"):
        RadiusSchedule(torch.optim.SGD([w], lr=0.1), constant)
    with pytest.raises(TypeError, match=r"SGD knows one norm.*radius='free'"):
        RadiusSchedule.from_lr(torch.optim.SGD([w], lr=0.1), constant)
    with pytest.raises(ValueError, match=r"no group has a sphere and radius='free'"):
        RadiusSchedule(SphereSGD([w], lr=0.1, sphere="row"), constant)
    with pytest.raises(ValueError, match=r"group 1 has no believed norm"):
        RadiusSchedule(free, constant, groups=[1])
    with pytest.raises(ValueError, match=r"factor\(0\) is -1.0; a radius needs a positive number"):
        RadiusSchedule(free, lambda t: -1)
    with pytest.raises(ValueError, match=r"lr_factor\(0\) is 0.0, which no finite radius"):
        RadiusSchedule.from_lr(free, lambda t: 0.0)
    with pytest.raises(ValueError, match=r"'w' has no recorded norms; the recording has 'v'"):
        RadiusReplay(free, {"v": torch.ones(2, 4)})
    with pytest.raises(ValueError, match=r"'w' needs norms of shape \(steps, 4\).*\(2, 3\)"):
        RadiusReplay(free, {"w": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"lr=0.1 times weight_decay=10.0 is 1 or more.*'w'"):
        RadiusReplay(free, {"w": torch.ones(2, 4)}, weight_decay=10.0)
    decayed = SphereSGD([("w", w)], lr=0.1, sphere="row", radius="free", weight_decay=0.1)
    with pytest.raises(ValueError, match=r"'w' has weight_decay=0.1, and the replay is to stand"):
        RadiusReplay(decayed, {"w": torch.ones(2, 4)}, weight_decay=0.1)
    l2 = SphereAdam([("w", w)], sphere="row", radius="free", decoupled_weight_decay=False)
    with pytest.raises(ValueError, match=r"SphereAdam is L2 in the gradient of 'w'"):
        RadiusReplay(l2, {"w": torch.ones(2, 4)}, weight_decay=0.1)
    assert "virtual_radius" not in l2.state[w]
