"""Against torch.optim: ordinary groups bit for bit, radius="free" direction for direction."""

import copy

import pytest
import torch
from optimizers import ROWS, Row
from torch import nn
from torch.nn import functional as F

import sphereopt as so
from sphereopt.geometry import angle, norm


def small_net(kind: str, eps: float) -> nn.Sequential:
    if kind == "batch":
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False),
            nn.BatchNorm2d(6, eps=eps),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, bias=False),
            nn.BatchNorm2d(4, eps=eps),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 5),
        )
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(72, 16, bias=False),
        nn.LayerNorm(16, eps=eps),
        nn.GELU(),
        nn.Linear(16, 8),
        nn.LayerNorm(8, eps=eps),
        nn.GELU(),
        nn.Linear(8, 5),
    )


def batches(count: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(64, 2, 6, 6, generator=generator, dtype=dtype)
    y = torch.randint(0, 5, (64,), generator=generator)
    picks = [torch.randperm(64, generator=generator)[:24] for _ in range(count)]
    return [(x[i], y[i]) for i in picks]


def train(model, optimizer, data, steps):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        (-loss if optimizer.defaults["maximize"] else loss).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_ordinary_groups_are_torch_bit_for_bit(row: Row, weight_decay: float, foreach):
    model = small_net("batch", 1e-5)
    twin = copy.deepcopy(model)
    data = batches(50, torch.float32)
    theirs = row.make_torch(twin.parameters(), weight_decay=weight_decay, foreach=foreach)
    ours = row.make(model.parameters(), weight_decay=weight_decay, foreach=foreach)
    train(model, ours, data, 50)
    train(twin, theirs, data, 50)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in theirs.state[q].items():
            assert value is None or torch.equal(ours.state[p][key], value)


# "joint" is the linear layer with its bias before LayerNorm: one sphere of two tensors.
SPHERES = {
    "batch": {"0.weight": "row", "3.weight": "row"},
    "layer": {"1.weight": "tensor", ("4.weight", "4.bias"): "tensor"},
}
FREE = [row for row in ROWS if row.free]


@pytest.mark.parametrize("kind", ["batch", "layer"])
@pytest.mark.parametrize("row", FREE, ids=str)
def test_free_follows_torch_for_300_steps(row: Row, kind: str):
    # eps makes the network not quite invariant; 1e-30 leaves rounding as the only difference.
    model = small_net(kind, 1e-30).double()
    twin = copy.deepcopy(model)
    data = batches(300, torch.float64)
    groups = so.param_groups(model, SPHERES[kind], decay_norms_and_biases=True)
    start = {
        n: norm(p.detach(), g["sphere"]) for g in groups if g["sphere"] for n, p in g["params"]
    }
    ours = row.make(groups, radius="free", weight_decay=5e-3)
    train(model, ours, data, 300)
    plain = dict(twin.named_parameters())
    # A joint sphere with a vector among its members is AdamW's as a whole.
    joint = [plain[n] for g in ours.param_groups if g["joint"] for n in g["param_names"]]
    adamw = {"adamw": joint} if row.cls is so.SphereMuon else {}
    theirs = row.make_torch(twin.parameters(), weight_decay=5e-3, **adamw)
    train(twin, theirs, data, 300)

    for group in ours.param_groups:
        if group["sphere"] is None:
            continue
        pairs = [(p, plain[n]) for n, p in zip(group["param_names"], group["params"], strict=True)]
        for unit in [pairs] if group["joint"] else [[pair] for pair in pairs]:
            state = ours.state[unit[0][0]]
            stored = torch.cat([rows(group, p) for p, _ in unit], dim=1)
            torchs = torch.cat([rows(group, q) for _, q in unit], dim=1)
            assert angle(stored, torchs, "row").max() <= 1e-10
            rho, plain_norm = state["virtual_radius"], torchs.norm(dim=1)
            assert (rho - plain_norm).abs().max() <= 1e-10
            assert (stored.norm(dim=1) / state["radius"] - 1).abs().max() <= 1e-12
            assert (rho / state["radius"] - 1).abs().min() > 1e-4, "the plain norm does move"
            if len(unit) == 1:
                before = start[
                    next(
                        n
                        for n, p in zip(group["param_names"], group["params"], strict=True)
                        if p is unit[0][0]
                    )
                ]
                assert torch.equal(state["radius"], before)


def rows(group, p):
    return p.detach().reshape(p.shape[0] if group["sphere"] == "row" else 1, -1)


def test_free_norm_grows_as_torch_in_float32_at_tiny_angles():
    # Each step grows the norm by 5e-13 relative, far below float32: an fp32 radius would stand.
    w = nn.Parameter(torch.randn(4, 256))
    r = norm(w.detach(), "row")
    optimizer = so.SphereSGD([w], lr=1.0, sphere="row", radius="free")
    generator = torch.Generator().manual_seed(1)
    expected = r.square()
    for _ in range(2000):
        g = so.geometry.tangent(w.detach(), torch.randn(w.shape, generator=generator), "row")
        g *= (1e-6 * r / norm(g, "row")).float()[:, None]
        w.grad = g
        rho = optimizer.state[w].get("virtual_radius", r)
        expected = expected + (norm(g, "row") * r / rho) ** 2
        optimizer.step()
    growth = optimizer.state[w]["virtual_radius"] / r - 1
    # 2000 * 1e-12 / 2; the dots are float32 sums, so a few percent of rounding remain.
    torch.testing.assert_close(growth, expected.sqrt() / r - 1, rtol=0.05, atol=0)


def test_evaluation_differs_by_the_running_statistics_only():
    # While the plain norm moves, BatchNorm's averages mix outputs of different scale; under "free"
    # they do not. Averaging anew over the same data makes both networks one again.
    model = small_net("batch", 1e-30).double()
    twin = copy.deepcopy(model)
    data = batches(100, torch.float64)
    groups = so.param_groups(model, SPHERES["batch"], decay_norms_and_biases=True)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}
    train(model, so.SphereSGD(groups, radius="free", **options), data, 100)
    train(twin, torch.optim.SGD(twin.parameters(), **options), data, 100)
    x = data[0][0]
    stale = (model.eval()(x) - twin.eval()(x)).abs().max()
    for net in (model, twin):
        for norm_layer in (net[1], net[4]):
            norm_layer.reset_running_stats()
            norm_layer.momentum = None
        net.train()(x)
    fresh = (model.eval()(x) - twin.eval()(x)).abs().max()
    assert stale > 1e-3
    assert fresh < 1e-10


def test_torch_checkpoint_continues_under_free():
    # A torch.optim.SGD run can be taken over mid-way: its momentum is in plain units already.
    model = small_net("batch", 1e-30).double()
    twin = copy.deepcopy(model)
    data = batches(60, torch.float64)
    groups = so.param_groups(model, SPHERES["batch"], decay_norms_and_biases=True)
    first = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=5e-3)
    reference = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
    for optimizer, net in ((first, model), (reference, twin)):
        for x, y in data[:30]:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    groups = so.param_groups(model, SPHERES["batch"], decay_norms_and_biases=True)
    ours = so.SphereSGD(groups, lr=0.05, momentum=0.9, weight_decay=5e-3, radius="free")
    ours.load_state_dict(first.state_dict())
    for optimizer, net in ((ours, model), (reference, twin)):
        for x, y in data[30:]:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.ndim == 4:
            assert angle(p.detach(), q.detach(), "row").max() <= 1e-10
