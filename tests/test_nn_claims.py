"""Beyond BatchNorm's three claims about networks at initialization, measured on small ones."""

import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
#: Sixteen convolutions of width 32; all figures are means over three seeds.
SMALL = {"depth": 16, "width": 32, "size": 8, "batch": 32}
SEEDS = range(3)


@pytest.fixture
def networks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import beyond_batchnorm

    return beyond_batchnorm


@cache
def measured(networks, name, residual=False, skipinit=False):
    block = networks.BLOCKS[name] if isinstance(name, str) else networks.by_size(32)[name]
    return networks.mean(block, SEEDS, residual=residual, skipinit=skipinit, **SMALL)


def straightness(networks, variance):
    """Return R² of a line through the variances, and through their logarithms."""
    return networks.straightness(variance), networks.straightness([math.log(v) for v in variance])


def test_normalizers_of_activations_keep_residual_variance_from_growing_exponentially(networks):
    for name in networks.ACTIVATIONS:
        variance = measured(networks, name, residual=True)["variance"]
        line, exponential = straightness(networks, variance)
        # Twice as deep, twice the variance for exactly linear growth; a thousand times without.
        assert 1.7 < variance[-1] / variance[7] < 3.2, name
        assert line > 0.95, name
        if name != "VarianceNorm":  # its branches keep their means, and add up coherently
            assert line > exponential, name
            assert variance[-1] / variance[0] < SMALL["depth"], name


def test_normalizers_of_weights_and_none_let_it_grow_exponentially(networks):
    for name in ("none", "weight norm", "weight standardization"):
        variance = measured(networks, name, residual=True)["variance"]
        line, exponential = straightness(networks, variance)
        assert exponential > 0.98, name
        assert line < 0.5, name
        assert variance[-1] > 1e4 * variance[0], name


def test_skipinit_keeps_it_constant_whatever_the_branch(networks):
    for name in ("none", "weight norm", "weight standardization", "BatchNorm"):
        variance = measured(networks, name, residual=True, skipinit=True)["variance"]
        assert variance == pytest.approx([variance[0]] * SMALL["depth"], rel=1e-6), name


def test_larger_groups_make_samples_alike_and_gradients_even(networks):
    rows = [measured(networks, size) for size in (1, 2, 4, 8, 16, 32)]
    for key, sign in (("similarity", 1), ("stable rank", -1), ("gradient ratio", -1)):
        values = [sign * row[key] for row in rows]
        assert values == sorted(values), key
        assert len(set(values)) == len(values), key
    assert rows[-1]["similarity"] > 1.5 * rows[0]["similarity"]
    assert rows[0]["gradient ratio"] > 5 * rows[-1]["gradient ratio"]


def test_instance_norm_has_the_steepest_gradient_and_layer_norm_the_most_alike_samples(networks):
    rows = {name: measured(networks, name) for name in networks.ACTIVATIONS}
    assert max(rows, key=lambda name: rows[name]["gradient ratio"]) == "InstanceNorm"
    assert max(rows, key=lambda name: rows[name]["similarity"]) == "LayerNorm"
    assert min(rows, key=lambda name: rows[name]["stable rank"]) == "LayerNorm"


def test_the_four_quantities_have_the_values_of_a_known_case(networks):
    # Two samples at an angle of 60 degrees: Gram matrix [[1, .5], [.5, 1]], eigenvalues 1.5, 0.5.
    x = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]]).view(2, 1, 1, 2)
    assert networks.similarity(3 * x) == pytest.approx(0.5)
    assert networks.stable_rank(3 * x) == pytest.approx(2 / 1.5)
    assert networks.variance(x) == pytest.approx(x.flatten().var().item())
    assert networks.straightness([1.0, 3.0, 5.0]) == pytest.approx(1)


def test_propagation_measures_the_same(networks):
    from sphereopt.diagnostics import propagation

    torch.manual_seed(0)
    model = networks.Network(networks.BLOCKS["GroupNorm"], 4, 16, residual=False, skipinit=False)
    x, labels = networks.images(8, 8, torch.Generator().manual_seed(0)), torch.arange(8)
    before, activations, loss = model(x, labels)
    grads = torch.autograd.grad(loss, before)
    report = propagation(model, (x, labels), loss=lambda out: out[2])
    rows = {layer.name: layer for layer in report.layers}
    for index, (activation, grad) in enumerate(zip(activations, grads, strict=True)):
        relu, conv = rows[f"blocks.{index}.2"], rows[f"blocks.{index}.0"]
        assert relu.variance == pytest.approx(networks.variance(activation), rel=0.01)
        assert relu.similarity == pytest.approx(networks.similarity(activation), rel=1e-4)
        assert relu.stable_rank == pytest.approx(networks.stable_rank(activation), rel=1e-4)
        assert conv.grad_norm == pytest.approx(grad.norm().item(), rel=1e-4)


PAGE = (ROOT / "docs/nn/beyond_batchnorm.md").read_text()
FOUND = json.loads((ROOT / "docs/results/beyond_batchnorm.json").read_text())


def table(name):
    """Return the cells of a table of the page, between its marks, without the head."""
    lines = PAGE.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0].split("\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    return rows[:1] + rows[2:]


def test_the_code_of_the_page_runs():
    names: dict = {}
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(block, names)


def test_the_figures_of_the_page_are_those_measured():
    results = FOUND["results"]
    rows = table("figures")[1:]
    assert [row[0] for row in rows] == list(results["plain"])
    for name, *cells in rows:
        plain, variance = results["plain"][name], results["residual"][name]["variance"]
        wanted = [plain[key] for key in ("similarity", "stable rank", "gradient ratio")]
        wanted += [variance[-1] / variance[0], variance[-1] / variance[9]]
        assert cells == [figure(value) for value in wanted], name
    head, *rows = table("sizes")
    assert head[1:] == list(results["group size"])
    for key, *cells in rows:
        assert cells == [figure(row[key]) for row in results["group size"].values()], key
    head, time, kept = table("costs")
    assert head[1:] == list(FOUND["cost"])
    assert time[1:] == [f"{row['time']:.1f}" for row in FOUND["cost"].values()]
    assert kept[1:] == [str(row["kept"]) for row in FOUND["cost"].values()]


def test_what_the_page_says_of_straightness_is_in_the_results():
    rows = {name: FOUND["results"]["residual"][name] for name in FOUND["cost"]}
    curved = [name for name, row in rows.items() if row["straight"] < row["straight log"]]
    assert curved == ["VarianceNorm"]
    skip = [v for row in FOUND["results"]["skipinit"].values() for v in row["variance"]]
    assert skip == pytest.approx([0.51] * len(skip), abs=0.005)


def figure(value):
    """Return a number as the page prints it."""
    return f"{value:.3g}" if value < 1e3 else f"{value:.0e}".replace("e+0", "e")


def test_skipinit_lets_the_gain_move_first():
    from sphereopt.nn.skip_init import SkipInit

    branch = nn.Sequential(nn.Linear(3, 3), SkipInit())
    x = torch.randn(4, 3)
    (x + branch(x)).square().sum().backward()
    assert float(branch[1].gain.grad.abs()) > 0
    assert float(branch[0].weight.grad.abs().max()) == 0
