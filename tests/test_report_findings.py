"""Findings: a planted fault is found, in its layer and at its step; without one there is none."""

import math
import re

import numpy as np
import pytest
import torch
from logs import STATS, make_rows, make_run, name
from torch import nn

import sphereopt as so
from sphereopt.report import History, findings
from sphereopt.report.findings import verdict

STEPS, EVERY, LAYERS = 800, 4, 6


def made(change=None, *, steps=STEPS, layers=LAYERS, run=None, **more):
    """Return the history of a made run, each row changed in place by ``change(row)``."""
    rows = list(make_rows(steps, layers, every=EVERY, **more))
    for row in rows:
        if change is not None:
            change(row)
    return History.from_rows(rows, [run or make_run(layers, every=EVERY)])


def scaled(layer, probe, factor, after=0):
    """Return a change: a probe of a layer times a factor, beyond a step."""

    def change(row):
        if row["step"] > after:
            table = row["parameters"][name(layer)][probe]
            table.update({key: None if factor is None else factor * table[key] for key in table})

    return change


def bad(found):
    return [x for x in found if x.severity in ("fault", "warning")]


def only(found, chart):
    """Return the one finding that is not fine, which must be of this chart."""
    assert [x.chart for x in bad(found)] == [chart], [x.sentence for x in found]
    return bad(found)[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("decay", [5e-4, 5e-3])
def test_a_clean_run_has_no_faults_and_no_warnings(seed, decay):
    # Long enough in relaxation times, 1/(4 lr decay/(1-momentum)) = 500 steps, to settle.
    history = made(steps=4000, seed=seed, weight_decay=decay)
    found = findings(history)
    assert bad(found) == []
    assert verdict(history, found).startswith("Nothing stands out in 6 layers")
    assert any("Norms had settled" in x.sentence and x.severity == "good" for x in found)


@pytest.mark.parametrize("probe", ["norm", "angle", "scaled_grad_norm"])
def test_what_is_not_a_number_is_found_at_its_layer_and_step(probe):
    found = findings(made(scaled(3, probe, None, after=300)))
    assert found[0].severity == "fault"
    assert found[0].layers == (name(3),)
    assert found[0].since == 304
    assert "not a number since step 304" in found[0].sentence


def test_one_sphere_that_is_not_a_number_is_enough():
    def change(row):
        if row["step"] == 400:  # sorted last: mean and max are gone, the median is not
            row["parameters"][name(1)]["norm"].update(mean=None, max=None)

    first = findings(made(change))[0]
    assert (first.severity, first.layers, first.since) == ("fault", (name(1),), 400)
    assert "at step 400" in first.sentence


def test_the_first_layer_that_breaks_is_named_first():
    changes = [scaled(4, "norm", None, after=200), scaled(2, "norm", None, after=220)]
    first = findings(made(lambda row: [change(row) for change in changes]))[0]
    assert first.layers == (name(4), name(2))
    assert f"{name(4)} and 1 other layer " in first.sentence


def test_weights_that_stop_are_found():
    found = findings(made(scaled(2, "angle", 0.0, after=500)))
    fault = only(found, "angles")
    assert fault.severity == "fault"
    assert (fault.layers, fault.since) == ((name(2),), 504)
    assert "though its learning rate is not zero" in fault.sentence


def test_a_learning_rate_of_zero_explains_that_weights_stop():
    def change(row):
        if row["step"] > 500:
            entry = row["parameters"][name(2)]
            entry["lr"] = 0.0
            entry["angle"] = dict.fromkeys(STATS, 0.0)

    notes = [x for x in findings(made(change)) if "does not turn" in x.sentence]
    assert [x.severity for x in notes] == ["note"]
    assert "because the learning rate is zero" in notes[0].sentence


def test_two_steps_of_no_turning_are_chance():
    assert bad(findings(made(scaled(2, "angle", 0.0, after=STEPS - 2 * EVERY)))) == []


def test_dead_units_within_a_layer_are_found():
    def change(row):
        row["parameters"][name(5)]["angle"].update(min=0.0, q25=0.0)

    assert only(findings(made(change)), "angles").layers == (name(5),)


def test_a_gradient_that_vanishes_in_one_layer_is_found_late_by_half_a_window_at_most():
    found = findings(made(scaled(1, "scaled_grad_norm", 1e-8, after=400)))
    fault = only(found, "scaled-grad-norm")
    assert fault.layers == (name(1),)
    # Medians over 10 rows change after 5 of them.
    assert 400 < fault.since <= 400 + 6 * EVERY
    assert "vanished" in fault.sentence


def test_gradients_that_all_fall_with_the_loss_are_no_fault():
    def change(row):
        for entry in row["parameters"].values():
            table = entry["scaled_grad_norm"]
            table.update({key: x * 10 ** (-row["step"] / 80) for key, x in table.items()})

    assert bad(findings(made(change))) == []


@pytest.mark.parametrize(("factor", "word"), [(9.0, "faster"), (1 / 9.0, "slower")])
def test_a_layer_that_turns_at_another_pace_is_found(factor, word):
    warning = only(findings(made(scaled(3, "angle", factor, after=400))), "angles")
    assert warning.layers == (name(3),)
    assert 400 < warning.since <= 400 + 6 * EVERY
    said, pace = re.search(r"rotates ([\d.]+)x (\w+)", warning.sentence).groups()
    assert pace == word
    # Layers of a made run differ beforehand, their norms do.
    assert float(said) == pytest.approx(9, rel=0.3)
    assert math.exp(warning.size) == pytest.approx(float(said), rel=0.01)


def test_a_layer_with_a_learning_rate_of_its_own_may_turn_at_its_own_pace():
    def change(row):
        row["parameters"][name(3)]["lr"] *= 9
        scaled(3, "angle", 9.0)(row)

    assert bad(findings(made(change))) == []


def test_a_spike_of_a_few_steps_is_no_other_pace():
    def change(row):
        if 300 < row["step"] < 300 + 4 * EVERY:
            scaled(3, "angle", 50.0)(row)

    assert bad(findings(made(change))) == []


@pytest.mark.parametrize("spread", [False, True])
def test_weights_that_are_not_scale_invariant_are_found(spread):
    def change(row):
        table = row["parameters"][name(4)]["grad_radial_share"]
        # One sphere points in and the next out: the median is 0.
        around = (-0.2, -0.5, -0.21, 0.0, 0.21, 0.5) if spread else [0.21] * 6
        table.update(zip(STATS, around, strict=True))

    warning = only(findings(made(change)), "grad-radial-share")
    assert warning.layers == (name(4),)
    assert ("0.311" if spread else "0.21") in warning.sentence  # 0.42/1.349, or the median


def test_constrained_weights_need_not_be_scale_invariant():
    def change(row):
        entry = row["parameters"][name(4)]
        entry["kind"] = "constrained"
        entry["grad_radial_share"].update(dict.fromkeys(STATS, 0.2))

    assert bad(findings(made(change))) == []


def test_half_precision_is_not_taken_for_a_radial_gradient():
    noise = np.random.default_rng(0)

    def change(row):
        for entry in row["parameters"].values():
            entry["grad_radial_share"].update(
                {key: float(noise.normal(0, 3e-3)) for key in STATS}  # eps of bfloat16, 2**-8
            )

    assert bad(findings(made(change))) == []


def test_a_fixed_norm_that_drifts_is_found():
    run = make_run(LAYERS, every=EVERY)
    run["groups"][0]["radius"] = "fixed"

    def change(row):
        for layer in range(LAYERS):
            drift = 1 + 0.03 * row["step"] / STEPS if layer == 2 else 1.0
            entry = row["parameters"][name(layer)]
            entry["norm"] = dict.fromkeys(STATS, 2.0 * drift)
            for probe in ("equilibrium_norm", "K_measured", "growth_law"):
                del entry[probe]

    warning = only(findings(made(change, run=run)), "norms")
    assert warning.layers == (name(2),)
    assert "drifted by 3 %" in warning.sentence
    assert warning.since == pytest.approx(STEPS / 3, abs=2 * EVERY)


@pytest.mark.parametrize("start", [0.5, 3.0])
def test_norms_far_from_equilibrium_are_found_with_the_steps_they_need(start):
    """The forecast is compared with the growth law itself, run on until it is within 5 %."""
    lr, decay, momentum, size = 0.1, 1e-4, 0.9, 1.0
    settled = (lr * size**2 / (2 * decay * (1 - momentum))) ** 0.25
    rate = 4 * lr * decay / (1 - momentum)

    def norm(step):
        return settled * (1 + (start**4 - 1) * math.exp(-rate * step)) ** 0.25

    def change(row):
        step, angle = row["step"], math.sqrt(2 * lr * decay / (1 + momentum))
        for entry in row["parameters"].values():
            theta = angle * (settled / norm(step)) ** 2
            entry["lr"], entry["weight_decay"] = lr, decay
            for probe, x in (
                ("norm", norm(step)),
                ("equilibrium_norm", settled),
                ("angle", theta),
                ("equilibrium_angle", angle),
                ("K_measured", 2 * lr * decay / (1 - momentum) / theta**2),
            ):
                entry[probe] = dict.fromkeys(STATS, x)

    steps = 400
    found = [x for x in findings(made(change, steps=steps)) if "Norms were" in x.sentence]
    assert [x.severity for x in found] == ["warning"]
    now = norm(steps) / settled - 1
    side, moving = ("above", "falling") if start > 1 else ("below", "rising")
    said = re.search(rf"were (\d+) % {side} equilibrium", found[0].sentence)[1]
    # It is a median over the last ten rows.
    assert float(said) == pytest.approx(100 * abs(now), rel=0.05)
    assert f"still {moving}" in found[0].sentence
    arrives = next(t for t in range(steps, 100_000) if abs(norm(t) / settled - 1) < 0.05)
    said = int(found[0].sentence.split("about ")[1].split(" more")[0].replace(",", ""))
    # Two digits are said, and the distance is a median over the last ten rows, 36 steps.
    assert said == pytest.approx(arrives - steps, rel=0.05)


def test_angles_are_said_to_follow_or_not():
    def change(factor):
        def each(row):
            for entry in row["parameters"].values():
                x = factor * entry["equilibrium_angle"]["median"]
                entry["angle"] = dict.fromkeys(STATS, x)

        return each

    follows = [x for x in findings(made(change(1.04))) if "Angles" in x.sentence]
    assert [x.severity for x in follows] == ["good"]
    assert "within 4 %" in follows[0].sentence
    parts = [x for x in findings(made(change(1.5))) if "Angles" in x.sentence]
    assert [x.severity for x in parts] == ["note"]
    assert "50 % above" in parts[0].sentence


def test_growth_that_rounding_swallows_is_found():
    def change(row):
        table = row["parameters"][name(3)]
        decayed = (table["K_measured"]["median"] or 0) * table["angle"]["median"] ** 2 / 2
        lost = 0.5 * (table["growth_law"]["mean"] + decayed)
        table["growth"].update({key: x - lost for key, x in table["growth"].items()})

    warning = only(findings(made(change)), "growth")
    assert warning.layers == (name(3),)


def test_a_layer_that_is_logged_no_more_is_found():
    def change(row):
        if row["step"] > 600:
            del row["parameters"][name(0)]

    warning = only(findings(made(change)), "norms")
    assert (warning.layers, warning.since) == ((name(0),), 600)


def test_an_effective_rate_that_norms_change_is_noted():
    found = findings(made(odd=("growing",), steps=4000, lr=0.5))
    notes = [x for x in found if x.chart == "effective-lr"]
    assert [x.severity for x in notes] == ["note"]
    assert "because norms grew" in notes[0].sentence


def test_faults_come_first_and_then_the_larger():
    changes = [
        scaled(2, "norm", None, after=500),
        scaled(3, "angle", 5.0),
    ]
    history = made(lambda row: [change(row) for change in changes])
    found = findings(history)
    order = ["fault", "warning", "note", "good"]
    ranks = [order.index(x.severity) for x in found]
    assert ranks == sorted(ranks)
    assert {0, 1, 2} <= set(ranks)
    assert found[2].size > found[1].size  # a note of 7x after a warning of 5x
    assert verdict(history, found).startswith("Something broke: 1 fault in 6 layers")


def test_short_logs_are_not_judged():
    for steps in (EVERY, 2 * EVERY):
        history = made(steps=steps)
        found = findings(history)
        assert bad(found) == []
        assert "too little to judge a course" in verdict(history, found)


@pytest.mark.parametrize("norm_eps", [1e-5, 1e-3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_norm_eps_and_half_precision_leave_a_weight_invariant_enough(dtype, norm_eps):
    """Why the threshold is 0.01: what these leave of cos(g, w) is below 0.005."""
    layers = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16, eps=norm_eps), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 36, 10))
    groups = so.param_groups(model, {"0.weight": "row"})
    optimizer, rows = torch.optim.SGD(groups, lr=0.05, momentum=0.9), []
    with so.track(optimizer, rows.append):
        for _ in range(20):
            x, y = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    shares = [row["parameters"]["0.weight"]["grad_radial_share"] for row in rows]
    assert 0 < max(abs(share["median"]) for share in shares) < 5e-3
    assert not any("not scale-invariant" in x.sentence for x in findings(rows))
