"""What lr and move a group gets that names none."""

import copy

import pytest
import torch
from torch import nn

import sphereopt as so

ORDINARY = {so.SphereSGD: 0.1, so.SphereAdam: 3e-3, so.SphereLion: 1e-3, so.SphereMuon: 1e-2}
ANGLE = {so.SphereSGD: 0.02, so.SphereAdam: 0.02, so.SphereLion: 0.03, so.SphereMuon: 0.02}
PLAIN = {so.SphereSGD: 1e-3, so.SphereAdam: 1e-3, so.SphereLion: 1e-4, so.SphereMuon: 1e-3}
CLASSES = pytest.mark.parametrize("cls", ORDINARY, ids=lambda cls: cls.__name__)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()


def groups(model):
    return so.param_groups(model, {"0.weight": "row"})


def train(model, optimizer, steps):
    torch.manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(16, 6, dtype=torch.float64), torch.randint(3, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@CLASSES
def test_spheres_turn_by_the_default_angle_and_others_have_their_own_rate(cls):
    model = net()
    optimizer = cls(groups(model))
    assert [(g["sphere"], g["lr"]) for g in optimizer.param_groups] == [
        ("row", ANGLE[cls]),
        (None, ORDINARY[cls]),
        (None, ORDINARY[cls]),
    ]
    before = model[0].weight.detach().clone()
    train(model, optimizer, 1)
    turned = so.geometry.angle(before, model[0].weight.detach(), "row")
    torch.testing.assert_close(turned, torch.full_like(turned, ANGLE[cls]), atol=1e-12, rtol=0)


@CLASSES
@pytest.mark.parametrize("lr", [None, 0.3])
@pytest.mark.parametrize(
    ("radius", "move"),
    [
        *(("fixed", move) for move in (None, *so.moves.MOVES)),
        *(("free", move) for move in (None, *sorted(set(so.moves.MOVES) - so.moves.RADIANS))),
    ],
)
def test_lr_has_the_unit_of_the_move(cls, move, radius, lr):
    optimizer = cls([torch.ones(2, 3)], lr=lr, sphere="row", move=move, radius=radius)
    (group,) = optimizer.param_groups
    rotates = lr is None or cls is not so.SphereSGD
    default = "renorm" if radius == "free" else "rotate" if rotates else "retract"
    assert group["move"] == (move or default)
    in_radians = group["move"] in so.moves.RADIANS
    assert group["lr"] == (lr or (ANGLE[cls] if in_radians else PLAIN[cls]))


@CLASSES
def test_each_group_is_asked_by_itself(cls):
    a, b, c, d = (torch.ones(2, 3) for _ in range(4))
    given = [{"params": [a], "sphere": "row", "lr": 0.5}, {"params": [b], "lr": None}]
    optimizer = cls([*given, {"params": [c], "sphere": "row"}])
    optimizer.add_param_group({"params": [d], "radius": "free"})
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, ORDINARY[cls], ANGLE[cls], PLAIN[cls]]
    moves = [g["move"] for g in optimizer.param_groups]
    assert moves == ["retract" if cls is so.SphereSGD else "rotate", None, "rotate", None]
    assert given[1]["lr"] is None, "the caller's groups are not written to"


@pytest.mark.parametrize(
    ("cls", "plain"),
    [(so.SphereSGD, torch.optim.SGD), (so.SphereAdam, torch.optim.Adam)],
    ids=["SGD", "Adam"],
)
def test_free_radius_without_lr_is_the_torch_optimizer_without_lr(cls, plain):
    ours, theirs = net(), net()
    ours[1].eps = theirs[1].eps = 1e-30
    train(ours, cls(groups(ours), radius="free"), 60)
    train(theirs, plain(groups(theirs)), 60)
    for model in (ours, theirs):  # of the filters only directions are the same
        model[0].weight.data = nn.functional.normalize(model[0].weight.data, dim=1)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@CLASSES
def test_schedules_and_checkpoints_know_the_rates(cls):
    def start():
        model = net()
        optimizer = cls(groups(model))
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    whole, optimizer, schedule = start()
    for _ in range(10):
        train(whole, optimizer, 1)
        schedule.step()
    first, *_ = optimizer.param_groups
    assert first["initial_lr"] == ANGLE[cls]
    assert first["lr"] == pytest.approx(ANGLE[cls] / 2)
    kept = copy.deepcopy([x.state_dict() for x in (whole, optimizer, schedule)])
    again = start()
    for part, state in zip(again, kept, strict=True):
        part.load_state_dict(state)
    train(whole, optimizer, 5)
    train(again[0], again[1], 5)
    assert all(map(torch.equal, whole.parameters(), again[0].parameters()))


def test_a_rule_of_ones_own_need_not_know_of_lr():
    class Gradient(so.SphereOptimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def state_keys(self, group, params):
            return so.optim.Keys(())

        def decay(self, group):
            return 0.0, 1.0

        def direction(self, grads, slab, group):
            return grads

        def plain_step(self, params, states, group):
            raise NotImplementedError

    optimizer = Gradient(
        [{"params": [torch.ones(2, 3)], "sphere": "row"}, {"params": torch.ones(1)}]
    )
    assert [(g["lr"], g["move"]) for g in optimizer.param_groups] == [
        (0.02, "rotate"),
        (1e-3, None),
    ]
