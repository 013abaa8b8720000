"""What was set otherwise in two runs, and when a cause may be named."""

import copy
import math

import pytest
import torch
from logs import make_rows, make_run, name
from small_model import continue_training, model_and_groups

import sphereopt as so
from sphereopt.report import History
from sphereopt.report.diff.difference import diff
from sphereopt.theory import equilibrium

LAYERS = 3


def history(run=None, change=None, steps=3000, every=10, **options):
    rows = [copy.deepcopy(row) for row in make_rows(steps, LAYERS, every=every, **options)]
    for row in rows if change else ():
        change(row)
    return History.from_rows(rows, [make_run(LAYERS, every=every) | (run or {})])


def groups(*each):
    """Return a header's groups: (layers, options that differ from the usual)."""
    usual = {"sphere": "row", "kind": "proved", "lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9}
    return {
        "groups": [{"names": [name(i) for i in which], **usual, **more} for which, more in each]
    }


def said(found):
    return [(x.what, x.a, x.b, x.names) for x in found.changes]


def test_groups_split_otherwise_with_the_same_options_are_the_same():
    split = history(groups(((2,), {}), ((0, 1), {})))
    assert diff(history(), split).same == "identical"


def test_an_option_of_one_layer_is_found_under_its_name():
    split = history(groups(((0, 2), {}), ((1,), {"momentum": 0.5})))
    found = diff(history(), split)
    assert said(found) == [("momentum", 0.9, 0.5, (name(1),))]
    assert found.differs
    assert found.verdict == (
        "Settings differ (momentum 0.9 → 0.5), but "
        "no layer differs by more than 10 % beyond noise.",
    )


def test_an_option_that_is_off_is_the_same_as_one_that_is_not_set():
    off = {"nesterov": False, "dampening": 0.0, "transport": "none", "betas": None}
    assert diff(history(), history(groups(((0, 1, 2), off)))).same == "identical"
    assert diff(history(), history(groups(((0, 1, 2), {"nesterov": True})))).differs


def test_where_the_spheres_are_is_part_of_the_settings():
    found = diff(history(), history(groups(((0, 1), {}), ((2,), {"sphere": "tensor"}))))
    assert said(found) == [("sphere", "row", "tensor", (name(2),))]


def test_how_the_same_numbers_are_computed_and_what_the_user_notes_does_not_count():
    other = {"versions": {"torch": "2.5.0"}, "device": "cuda:0", "config": {"seed": {"data": 1}}}
    one = history(groups(((0, 1, 2), {"foreach": True})))
    found = diff(one, history(groups(((0, 1, 2), {"foreach": False})) | other))
    assert not any(change.counts for change in found.changes)
    assert {"foreach", "config.seed.data", "versions.torch", "device"} <= {
        x.what for x in found.changes
    }
    assert not found.differs


def test_options_of_parameters_that_are_not_tracked_are_compared_as_well():
    plain = {"names": ["head.bias"], "sphere": None, "lr": 0.1}
    runs = [make_run(LAYERS, every=10) for _ in range(2)]
    for run, lr in zip(runs, (0.1, 0.3), strict=True):
        run["groups"].append(plain | {"lr": lr, "radius": f"radius of {lr}"})
    found = diff(*(history(run) for run in runs))
    assert said(found) == [("lr", 0.1, 0.3, ("head.bias",))]


@pytest.mark.parametrize("until", [None, 1500])
def test_a_schedule_is_compared_step_by_step(until):
    def change(row):
        if row["step"] >= 1000 and (until is None or row["step"] <= until):
            row["parameters"][name(1)]["lr"] *= 0.5

    (found,) = diff(history(), history(change=change)).changes
    assert (found.what, found.names, found.since, found.until) == ("lr", (name(1),), 1000, until)
    assert found.b == pytest.approx(0.5 * found.a)


def test_schedules_on_their_way_to_zero_are_compared_before_they_are_there():
    def change(row):
        row["parameters"][name(1)]["lr"] *= 0.5

    (found,) = diff(history(), history(change=change)).changes
    # The schedule peaks at step 150.
    assert (found.since, found.until, found.a) == (None, None, pytest.approx(0.1, rel=0.01))


def test_the_rates_of_a_resume_are_no_difference():
    """A resumed header tells the rate in the middle of a schedule; the rows tell the schedule."""
    bias = {"names": ["head.bias"], "sphere": None}
    runs = [make_run(LAYERS, every=10), make_run(LAYERS) | groups(((0, 1, 2), {"lr": 0.037}))]
    for run, lr in zip(runs, (0.1, 0.037), strict=True):
        run["groups"].append(bias | {"lr": lr})
    rows = list(make_rows(3000, LAYERS, every=10))
    resumed = History.from_rows(rows, runs)
    assert diff(history(runs[0]), resumed).same == "identical"


def test_without_headers_the_rows_tell_what_they_can():
    rows = list(make_rows(100, 2))
    other = copy.deepcopy(rows)
    for row in other:
        row["parameters"][name(1)]["sphere"] = "tensor"
    found = diff(History.from_rows(rows), History.from_rows(other))
    assert said(found) == [("sphere", "row", "tensor", (name(1),))]
    assert sum("no header" in note for note in found.notes) == 2


def test_a_cause_is_named_with_what_the_calculator_makes_of_it():
    four = groups(((0, 1, 2), {"weight_decay": 2e-3}))
    options = {"momentum": 0.9, "grad_norm": 1.0}
    few, many = (equilibrium("sgd", lr=0.1, weight_decay=x, **options).norm for x in (5e-4, 2e-3))
    # So far from the schedule's ends that the rate is nearly constant.
    far = {"steps": 20_000, "every": 100, "start": 1_000_000, "total": 10_000_000}
    found = diff(history(**far), history(four, weight_decay=2e-3, **far))
    for layer in found.layers:
        assert layer.predicted.norm == pytest.approx(many / few, rel=1e-3)
        assert layer.predicted.angle == pytest.approx(2, rel=1e-2)
        assert layer.courses["norm"].late == pytest.approx(many / few, rel=1e-2)
    assert "because of weight decay 0.0005 → 0.002: by the calculator" in found.verdict[0]


def test_options_of_the_headers_count_in_a_prediction():
    other = groups(((0, 1, 2), {"momentum": 0.5}))
    far = {"steps": 20_000, "every": 100, "start": 1_000_000, "total": 10_000_000}
    found = diff(history(**far), history(other, **far))
    # |w|^4 goes with 1 / (1 - momentum), the squared angle with 1 / (1 + momentum).
    assert found.layers[0].predicted.norm == pytest.approx((0.1 / 0.5) ** 0.25, rel=1e-2)
    assert found.layers[0].predicted.angle == pytest.approx((1.9 / 1.5) ** 0.5, rel=1e-2)


def test_no_cause_is_named_where_options_alone_would_make_something_else():
    def shrink(row):
        for entry in row["parameters"].values():
            entry["norm"] = {stat: 0.4 * x for stat, x in entry["norm"].items()}

    four = groups(((0, 1, 2), {"weight_decay": 2e-3}))
    found = diff(history(), history(four, weight_decay=2e-3, change=shrink))
    assert "because" not in found.verdict[0]
    assert "weight decay 0.0005 → 0.002" in found.verdict[0]
    assert "so it is not all" in found.verdict[0]


def test_no_cause_is_named_where_no_option_differs():
    found = diff(history(), history(seed=3))
    assert found.differs
    assert not found.changes
    assert "because" not in " ".join(found.verdict)
    assert "no option of an optimizer differs" in found.verdict[0]
    assert all(x.predicted.norm == pytest.approx(1) for x in found.layers)


def test_weights_on_spheres_by_choice_have_no_prediction():
    chosen = {"kind": "constrained"}
    one = history(groups(((0, 1, 2), chosen)))
    two = history(groups(((0, 1, 2), chosen | {"weight_decay": 2e-3})), weight_decay=2e-3)
    found = diff(one, two)
    assert all(layer.predicted is None for layer in found.layers)
    assert "because" not in found.verdict[0]


def trained(decay, rule, lr, seed=0):
    """Return the history of a real run on weights that are scale-invariant."""
    model, groups = model_and_groups()
    optimizer = rule(groups, lr=lr, weight_decay=decay)
    rows, runs = [], []

    class Sink:
        def start(self, run):
            runs.append(run)

        def __call__(self, row):
            rows.append(row)

    torch.manual_seed(seed)
    with so.track(optimizer, Sink(), every=4):
        continue_training(model, optimizer, 600)
    return History.from_rows(rows, runs)


@pytest.mark.parametrize(
    ("rule", "lr", "decays"),
    [
        (torch.optim.SGD, 0.1, (1e-2, 4e-2)),
        (torch.optim.AdamW, 3e-3, (1.0, 0.0)),
    ],
)
def test_real_runs_with_two_decays_turn_out_as_the_calculator_says(rule, lr, decays):
    one, two = (trained(decay, rule, lr) for decay in decays)
    found = diff(one, two)
    layer = next(x for x in found.layers if x.name == "0.weight")
    assert layer.courses["norm"].parted
    assert abs(math.log(layer.courses["norm"].late)) > math.log(1.15)
    # What theory and networks differ by, doubled, as in theory.at_equilibrium.
    assert layer.predicted.norm == pytest.approx(layer.courses["norm"].late, rel=0.2)
    assert "because of weight decay" in found.verdict[0]


def test_rates_in_other_units_are_not_compared():
    turning = groups(((0, 1), {}), ((2,), {"move": "rotate", "radius": "fixed"}))
    found = diff(history(), history(turning))
    there = {x.name: "effective_lr" in x.courses for x in found.layers}
    assert there == {name(0): True, name(1): True, name(2): False}
    assert any("other units" in note for note in found.notes)
