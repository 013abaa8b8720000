"""The theory on small real networks: short runs of what the benchmark does at length."""

import json
from pathlib import Path

import numpy as np
import pytest

import sphereopt as so
from sphereopt.theory import angle_schedule, schedule

ROOT = Path(__file__).parent.parent


@pytest.fixture
def networks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import theory_networks

    return theory_networks


@pytest.fixture
def conversions(networks):
    import theory_conversions

    return theory_conversions


# Faster than in the benchmark: 1200 steps are five memories, 700 of them are looked at. That leaves
# 1 % of drift in the angle of momentum; Adam's gradients are no white noise (docs/theory/networks).
CASES = (
    ("LayerNorm", "sgd", 0.1, 0.04, {}, 0.01, 0.01),
    ("BatchNorm", "sgd", 0.1, 3e-3, {"momentum": 0.9}, 0.025, 0.05),
    ("LayerNorm", "sgdw", 0.01, 0.4, {"momentum": 0.5}, 0.025, 0.05),
    ("BatchNorm", "adamw", 9e-3, 0.44, {"betas": (0.9, 0.95)}, 0.06, 0.1),
    ("LayerNorm", "adamw", 9e-3, 0.44, {"betas": (0.9, 0.95)}, 0.05, 0.1),
)


@pytest.mark.parametrize(
    ("network", "name", "lr", "decay", "hyper", "angle", "norm"),
    CASES,
    ids=[f"{row[0]} {row[1]}" for row in CASES],
)
def test_norm_and_angle_of_a_network_at_equilibrium(
    networks, network, name, lr, decay, hyper, angle, norm
):
    case = networks.Case(name, name, lr, decay, hyper)
    seen = networks.train(network, case, np.full(1200, lr), seed=0)
    found = [networks.at_equilibrium(case, one, 500) for one in seen]
    assert len(found) == 2
    for row in found:
        assert row["angle predicted"] == pytest.approx(row["angle"], rel=angle)
        assert row["norm predicted"] == pytest.approx(row["norm"], rel=norm)


@pytest.mark.parametrize(
    ("network", "name", "lr", "decay", "hyper", "angle", "norm"),
    [
        # 80 steps of one matrix in a window: the gradients' own noise is 4 %.
        ("QK-norm", "sgd", 0.1, 0.04, {}, 0.1, 0.005),
        ("LayerNorm", "adamw", 9e-3, 0.44, {"betas": (0.9, 0.95)}, 0.12, 0.1),
    ],
    ids=["QK-norm sgd", "LayerNorm adamw"],
)
def test_norm_and_angle_of_a_network_along_warm_up_and_cosine(
    networks, network, name, lr, decay, hyper, angle, norm
):
    case = networks.Case(name, name, lr, decay, hyper)
    rates = schedule("cosine", lr, 800, warmup=40, final=0.05)
    for seen in networks.train(network, case, rates, seed=0):
        row = networks.along_schedule(case, seen, rates, 10)
        np.testing.assert_allclose(row["norm predicted"], row["norm"], rtol=norm)
        # At first the loss falls, and gradients are no noise.
        np.testing.assert_allclose(row["angle predicted"][1:], row["angle"][1:], rtol=angle)
        assert max(row["angle"][1:]) > 3 * min(row["angle"])


def test_sphere_adam_follows_adamw_by_the_predicted_angles(conversions):
    rates = schedule("cosine", conversions.LR, 600, warmup=30, final=0.02)
    betas = conversions.BETAS

    def arm(factor):
        def angles(w):
            rms0 = w.square().mean().sqrt().item()
            decay = conversions.DECAY
            found = angle_schedule("adamw", lr=rates, weight_decay=decay, rms0=rms0, betas=betas)
            return factor * found

        return np.array(conversions.curve(0, 16, 600, 50, conversions.on_spheres(angles)))

    plan = conversions.adamw(rates, conversions.DECAY)
    original = np.array(conversions.curve(0, 16, 600, 50, plan))
    ours, without_k = np.abs(arm(1.0) - original), np.abs(arm(19**0.5) - original)
    assert ours.mean() < 0.02
    assert ours[-1] < 0.02
    assert without_k.mean() > 3 * ours.mean()


def test_the_networks_have_the_spheres_that_the_page_names(networks):
    for name, spec in (("BatchNorm", "row"), ("LayerNorm", "tensor")):
        model, batches = networks.build(name, 0)
        found = so.find_spheres(model, next(batches)[0]).spheres
        assert {n: s for n, s in found.items() if "weight" in n} == {
            "0.weight": spec,
            "3.weight": spec,
        }
    model, batches = networks.build("QK-norm", 0)
    found = so.find_spheres(model, next(batches)[0]).spheres
    assert found["query.weight"] == found["key.weight"] == "block:2"
    assert found["out.weight"] == "tensor"


def test_the_pages_tables_are_those_of_the_results(networks):
    import theory_conversions_figure

    for page, table in theory_conversions_figure.tables(ROOT / "docs/results").items():
        assert table in (ROOT / "docs/theory" / page).read_text(), page


def test_the_page_says_what_was_measured():
    page = (ROOT / "docs" / "theory" / "networks.md").read_text()
    found = json.loads((ROOT / "docs" / "results" / "theory_networks.json").read_text())

    def worst(what, optimizers, networks=("BatchNorm", "LayerNorm", "QK-norm")):
        rows = [r for r in found["rows"] if r["network"] in networks]
        return 100 * max(
            r[f"equilibrium, {what} error"]["worst"] for r in rows if r["optimizer"] in optimizers
        )

    family = ("SGD", "SGD, momentum 0.9", "SGDW 0.9")
    adamw = ("AdamW (0.9, 0.95)", "AdamW (0.9, 0.999)")
    said = (
        f"angle within {worst('angle', family):.1f} %, norm within {worst('norm', family):.1f} %",
        f"{worst('angle', ['Nesterov 0.9']):.1f} %, norm {worst('norm', ['Nesterov 0.9']):.1f} %",
        f"LayerNorm: {worst('angle', adamw):.1f} %; norm within {worst('norm', adamw):.1f} %",
        f"{worst('angle', ['Lion']):.0f} % in the angle and {worst('norm', ['Lion']):.0f} %",
    )
    for text in said:
        assert text in page
    assert worst("angle", adamw, ("BatchNorm", "QK-norm")) < 4
    l2 = [worst(what, ["Adam + L2"]) for what in ("angle", "norm")]
    assert f"angle within {l2[0]:.1f} %, norm within {l2[1]:.1f} %" in page
    for row in found["rows"]:
        if row["optimizer"] in ("Lion", "Muon"):
            continue
        for weight in row["windows"]:
            ratio = np.array(weight["angle predicted"]) / np.array(weight["angle"])
            assert np.abs(ratio[1:] - 1).max() < 0.11
    means = found["mean gradient over noise"]
    digits = [x for name in ("BatchNorm", "LayerNorm") for x in means[name].values()]
    assert f"{min(digits):.2f} to {max(digits):.2f} of its noise" in page
    text = means["QK-norm"].values()
    assert f"{min(text):.2f} to\n{max(text):.2f} on the text" in page
