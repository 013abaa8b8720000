"""The table of invariances: every row against find_spheres and against numbers."""

import copy

import pytest
import torch
from torch import nn

import sphereopt as so
from sphereopt.nn.invariances import INVARIANCES

DTYPE = torch.float64
ROWS = pytest.mark.parametrize("row", INVARIANCES.values(), ids=INVARIANCES)
CHANNELS = 8


def layer(row, bias):
    torch.manual_seed(0)
    made = {
        "conv": lambda: nn.Conv2d(3, CHANNELS, 3, bias=bias, dtype=DTYPE),
        "linear": lambda: nn.Linear(5, CHANNELS, bias=bias, dtype=DTYPE),
    }
    return made[row.on]()


def unit(row, bias=False, eps=True):
    """Return the normalized unit in float64; without norm eps if asked to."""
    module = row.unit(layer(row, bias)).to(DTYPE)
    for part in module.modules():
        if not eps and isinstance(getattr(part, "eps", None), float):
            part.eps = 1e-30  # torch's batch_norm takes no zero
    return module


def inputs(row, seed=1):
    shape = (6, 3, 7, 7) if row.on == "conv" else (6, 5)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def weight_of(module):
    """Return the parameter that the table's W is."""
    names = [n for n, p in module.named_parameters() if p.dim() > 1]
    # The direction of a parametrized weight is its last original; gains come before it.
    name = [n for n in names if "original" in n or n == "0.weight"][-1]
    return name, dict(module.named_parameters())[name]


def head(row):
    pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten()] if row.on == "conv" else []
    features = CHANNELS * 4 if row.on == "conv" else CHANNELS
    return nn.Sequential(nn.Tanh(), *pool, nn.Linear(features, 3, dtype=DTYPE))


def spec(row):
    return {"block": "block:2"}.get(row.sphere, row.sphere)


@ROWS
def test_detection_finds_the_spheres_of_the_table(row):
    model = nn.Sequential(unit(row), head(row))
    found = so.find_spheres(model, inputs(row))
    name, _ = weight_of(model[0])
    assert found[f"0.{name}"].sphere == spec(row)
    assert found[f"0.{name}"].status == ("none" if row.sphere is None else "proved")


@ROWS
def test_detection_finds_what_a_bias_before_it_does(row):
    torch.manual_seed(3)
    model = nn.Sequential(unit(row, bias=True), head(row))
    name, _ = weight_of(model[0])
    bias = f"0.{name.split('.')[0]}.bias" if row.bias != "apart" else "0.bias"
    found = so.find_spheres(model, inputs(row))
    weight = found[f"0.{name}"]
    if row.bias == "removed":
        assert (weight.sphere, weight.joint, found[bias].status) == ("row", (), "inert")
    elif row.bias == "joint":
        assert (weight.sphere, weight.joint) == (spec(row), (bias,))
    elif row.bias == "apart":
        assert (weight.sphere, weight.joint) == (spec(row), ())
        assert found[bias].status == "none"
    else:
        assert weight.sphere is None


@torch.no_grad()
def changed(row, change, bias=False):
    """Return how much the output changes, relative to its size, when ``change`` is done."""
    module = unit(row, bias, eps=False)
    if "spectral" in row.name:
        module.eval()  # its power iteration would go on with every forward
    x = inputs(row)
    before = copy.deepcopy(module)(x)
    x = change(module, x)
    after = module(x)
    return ((after - before).norm() / before.norm()).item()


EXACT = 1e-12


def rescaled(groups):
    """Return a change of W by a factor of its own for each of ``groups`` equal blocks of rows."""

    def change(module, x):
        _, w = weight_of(module)
        factors = torch.linspace(0.5, 3, groups, dtype=DTYPE).repeat_interleave(len(w) // groups)
        w.mul_(factors.view(-1, *[1] * (w.dim() - 1)))
        return x

    return change


@ROWS
def test_each_sphere_may_be_rescaled_and_nothing_finer(row):
    finest = {"row": CHANNELS, "block": 2, "tensor": 1, None: 0}[row.sphere]
    for groups in (1, 2, CHANNELS):
        # One group of factor 1 would change nothing: the single factor is 0.5.
        assert (changed(row, rescaled(groups)) < EXACT) == (groups <= finest)


@pytest.mark.parametrize(
    # Frozen singular vectors turn the sign of u'Wv as well, so that here W and -W are one.
    "row",
    [r for r in INVARIANCES.values() if r.name != "spectral_norm"],
    ids=lambda r: r.name,
)
def test_signs_are_no_part_of_it(row):
    def negated(module, x):
        weight_of(module)[1].mul_(-1)
        return x

    assert changed(row, negated) > 0.1


SHIFTS = {
    "row": lambda w: torch.linspace(-1, 2, len(w), dtype=DTYPE).unsqueeze(1).expand_as(w),
    "all rows": lambda w: torch.linspace(-1, 2, w.shape[1], dtype=DTYPE).expand_as(w),
    "rows of a group": lambda w: (
        torch.randn(2, 1, w.shape[1], dtype=DTYPE).expand(2, len(w) // 2, -1).reshape(w.shape)
    ),
}
# A shift of all rows is one of the rows of a group, with the same vector for every group.
IMPLIED = {"rows of a group": {"rows of a group", "all rows"}}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(
    "row", [r for r in INVARIANCES.values() if r.on == "linear"], ids=lambda r: r.name
)
def test_only_the_shift_of_the_table_changes_nothing(row, shift):
    def moved(module, x):
        _, w = weight_of(module)
        w.add_(SHIFTS[shift](w))
        return x

    claimed = IMPLIED.get(row.shift, {row.shift})
    assert (changed(row, moved) < EXACT) == (shift in claimed)


@ROWS
def test_inputs_may_be_rescaled_as_the_table_says(row):
    def by(factors):
        return lambda module, x: x * factors.view(-1, *[1] * (x.dim() - 1))

    batch = changed(row, by(torch.full((6,), 3.0, dtype=DTYPE)))
    sample = changed(row, by(torch.linspace(0.5, 3, 6, dtype=DTYPE)))
    assert (batch < EXACT) == (row.data is not None)
    assert (sample < EXACT) == (row.data == "sample")


@ROWS
def test_a_bias_is_removed_only_where_the_table_says_so(row):
    def biased(module, x):
        bias = next(p for n, p in module.named_parameters() if n in ("0.bias", "bias"))
        bias.add_(torch.linspace(-1, 2, CHANNELS, dtype=DTYPE))
        return x

    assert (changed(row, biased, bias=True) < EXACT) == (row.bias == "removed")


def test_every_manifold_has_a_name():
    assert INVARIANCES["BatchNorm"].manifold == "oblique: a sphere per row"
    assert {r.manifold for r in INVARIANCES.values()} == {
        "oblique: a sphere per row",
        "a sphere per group of rows",
        "one sphere",
        "none",
    }


def test_a_learned_eps_leaves_no_invariance():
    """It is a parameter: nothing says that it tends to zero."""
    torch.manual_seed(0)
    norm = so.nn.FilterResponseNorm2d(CHANNELS, learnable_eps=True, eps=1e-3)
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, bias=False), norm, nn.Tanh())
    assert so.find_spheres(model, torch.randn(4, 3, 7, 7))["0.weight"].status == "none"


@pytest.mark.parametrize(
    "row", [r for r in INVARIANCES.values() if r.data == "batch"], ids=lambda r: r.name
)
def test_running_statistics_leave_no_invariance_either(row):
    module = unit(row).eval()
    x = inputs(row)
    with torch.no_grad():
        before = module(x)
        rescaled(1)(module, x)
        assert (module(x) - before).norm() > 0.1 * before.norm()
