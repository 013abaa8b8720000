"""What changed between two runs: planted differences are found, and none are invented."""

import copy
import json
import math

import numpy as np
import pytest
from logs import make_rows, make_run, name, write_log

from sphereopt.report import History
from sphereopt.report.diff.align import aligned
from sphereopt.report.diff.course import MEASURES, apart, course
from sphereopt.report.diff.difference import diff
from sphereopt.report.diff.text import as_text

STEPS = np.arange(1, 301)


def history(steps=1000, layers=6, every=5, run=None, change=None, **options):
    rows = [copy.deepcopy(row) for row in make_rows(steps, layers, every=every, **options)]
    for row in rows if change else ():
        change(row)
    return History.from_rows(rows, [make_run(layers, every=every, **(run or {}))])


def times(layer, factor, since, probes):
    """Return what multiplies probes of a layer from a step on."""

    def change(row):
        if row["step"] >= since:
            for probe in probes:
                table = row["parameters"][name(layer)][probe]
                table.update({stat: x and x * factor for stat, x in table.items()})

    return change


def noisy(seed, size=0.3, slow=0.02):
    """Return what a seed does: angles and gradients differ by step, norms by a slow walk."""
    rng, walk = np.random.default_rng(seed), np.zeros(6)

    def change(row):
        walk[:] = 0.95 * walk + rng.normal(0, slow * math.sqrt(1 - 0.95**2), 6)
        for i, entry in enumerate(row["parameters"].values()):
            jump = rng.normal(0, size)
            for probe, shift in (
                ("norm", walk[i]),
                ("effective_lr", -2 * walk[i]),
                ("angle", jump - 2 * walk[i]),
                ("scaled_grad_norm", jump),
            ):
                entry[probe] = {stat: x * math.exp(shift) for stat, x in entry[probe].items()}
            for probe in ("radial_share", "momentum_alignment"):
                jump = rng.normal(0, 0.1)
                entry[probe] = {stat: x + jump for stat, x in entry[probe].items()}
        row["metrics"]["loss"] *= math.exp(rng.normal(0, 0.3))

    return change


def layer(found, index):
    return next(one for one in found.layers if one.name == name(index))


@pytest.mark.parametrize("factor", [2.0, 1.3, 0.5])
@pytest.mark.parametrize("since", [5, 300, 700])
def test_a_planted_difference_is_found_where_and_when_it_is(factor, since):
    found = diff(history(), history(change=times(2, factor, since, ["norm"])))
    assert found.differs
    assert found.layers[0].name == name(2)
    assert [one.name for one in found.layers if one.parted] == [name(2)]
    how = found.layers[0].courses["norm"]
    # Of the second half, 500 ... 1000, those before it are the same.
    share = min(1.0, (1000 - since + 5) / 505)
    assert how.late == pytest.approx(factor**share, rel=0.01)
    assert how.since == since
    assert how.end == pytest.approx(factor)
    assert how.largest == pytest.approx(factor)
    assert how.largest_at >= since
    assert not found.layers[0].courses["angle"].parted


@pytest.mark.parametrize("seed", range(8))
def test_the_noise_of_seeds_is_no_difference(seed):
    one, two = history(change=noisy(2 * seed)), history(change=noisy(2 * seed + 1))
    found = diff(one, two)
    assert found.same == "tolerance", found.verdict


@pytest.mark.parametrize("seed", range(4))
def test_a_difference_is_found_through_the_noise_of_seeds(seed):
    noise = noisy(2 * seed + 1)

    def change(row):
        noise(row)
        times(3, 1.5, 400, ["angle"])(row)

    found = diff(history(change=noisy(2 * seed)), history(change=change))
    assert [one.name for one in found.layers if one.parted] == [name(3)]
    how = found.layers[0].courses["angle"]
    # Noise of 0.3 in both, over a hundred rows: 4 %, and three times that.
    assert how.late == pytest.approx(1.5, rel=0.13)


def test_the_two_directions_mirror_each_other():
    one = history(change=noisy(0))
    two = history(change=times(2, 1.7, 300, ["norm", "angle"]), weight_decay=2e-3)
    here, there = diff(one, two), diff(two, one)
    assert {x.name for x in here.layers} == {x.name for x in there.layers}
    for mine in here.layers:
        its = next(x for x in there.layers if x.name == mine.name)
        assert (mine.parted, mine.since) == (its.parted, its.since)
        for probe, how in mine.courses.items():
            back = its.courses[probe]
            assert (how.parted, how.since, how.largest_at) == (
                back.parted,
                back.since,
                back.largest_at,
            )
            for x, y in ((how.late, back.late), (how.end, back.end), (how.largest, back.largest)):
                assert (x * y if how.is_ratio else x + y + 1) == pytest.approx(1)
        if mine.predicted is not None:
            assert mine.predicted.norm * its.predicted.norm == pytest.approx(1)
    assert [(x.what, x.a, x.b) for x in here.changes] == [(x.what, x.b, x.a) for x in there.changes]


def test_a_run_and_itself_are_identical():
    found = diff(history(), history())
    assert found.same == "identical"
    assert found.verdict == ("The two logs are identical.",)
    assert "Dynamics" not in str(found)


def test_runs_that_differ_in_the_last_digits_are_the_same_to_rounding():
    found = diff(history(), history(change=times(1, 1 + 1e-7, 5, ["norm", "angle"])))
    assert found.same == "rounding"
    assert diff(history(), history(change=times(1, 1.001, 5, ["norm"]))).same == "tolerance"


def test_the_tolerance_is_what_it_says():
    for factor in (1.04, 1 / 1.04):
        two = history(change=times(1, factor, 5, ["norm"]))
        assert not diff(history(), two, tolerance=0.05).differs
        assert diff(history(), two, tolerance=0.03).differs


def test_logs_with_other_steps_are_compared_on_the_common_ones():
    found = diff(history(every=4), history(every=6, change=times(1, 2.0, 500, ["norm"])))
    assert found.steps == (83, 12, 996)
    assert layer(found, 1).courses["norm"].since == pytest.approx(500, abs=12)
    assert not any("interpolated" in note for note in found.notes)


def test_logs_without_common_steps_are_interpolated_and_say_so():
    rows = list(make_rows(1000, 6, every=10))
    moved = [row | {"step": row["step"] + 3} for row in copy.deepcopy(rows)]
    for row in moved:
        times(1, 2.0, 500, ["norm"])(row)
    found = diff(History.from_rows(rows), History.from_rows(moved))
    assert any("interpolated" in note for note in found.notes)
    assert layer(found, 1).courses["norm"].late == pytest.approx(2, rel=0.02)
    assert layer(found, 1).courses["norm"].since == pytest.approx(500, abs=13)
    # A warm-up of 50 steps is steep: what differs there is the interpolation, not the runs.
    assert not any(layer(found, i).courses["norm"].parted for i in (0, 2, 3, 4, 5))


def test_interpolation_is_exact_for_what_is_linear_in_the_logarithm_of_the_step():
    def run(steps):
        size = {s: {"median": 1 + math.log1p(s)} for s in steps}
        return History.from_rows(
            [{"step": s, "parameters": {"w": {"norm": size[s]}}} for s in steps]
        )

    one, two = run(range(10, 500, 10)), run(range(7, 500, 20))
    on = aligned(one, two)
    assert on.interpolated
    assert on.steps.tolist() == [*range(27, 490, 20)]  # those of the sparser log, within both
    np.testing.assert_allclose(on.a.of(one.of("norm")), on.b.of(two.of("norm")), rtol=1e-12)


def test_runs_of_other_lengths_and_resumed_runs_are_compared_where_they_overlap(tmp_path):
    whole = write_log(tmp_path / "a.jsonl", make_rows(1000, 4, every=5), [make_run(4, every=5)])
    path = write_log(tmp_path / "b.jsonl", make_rows(600, 4, every=5, total=1000), [make_run(4)])
    late = make_rows(200, 4, every=5, start=400, total=1000)
    write_log(path, late, [make_run(4, every=5, start=400)], append=True)
    found = diff(whole, path)
    assert not found.differs
    assert found.steps == (120, 5, 600)
    assert any("a goes on to step 1,000" in note for note in found.notes)
    assert any("superseded" in note for note in found.notes)


def test_logs_without_overlap_are_compared_in_settings_only():
    late = History.from_rows(make_rows(100, 3, start=500, total=600), [make_run(3)])
    found = diff(history(steps=100, layers=3), late)
    assert found.differs
    assert found.steps == (0, 0, 0)
    assert "no steps in common" in found.verdict[0]
    assert str(found)


@pytest.mark.parametrize("odd", ["nan", "gone"])
def test_a_layer_without_numbers_at_the_end_is_named_first(odd):
    found = diff(history(), history(odd=(odd,)))
    assert found.layers[0].name == name(5)
    assert (found.layers[0].lost.run, found.layers[0].lost.step) == ("b", 505)
    assert found.verdict[0] == f"b has no numbers of {name(5)} from step 505 on."
    assert found.differs
    assert diff(history(odd=(odd,)), history()).layers[0].lost.run == "a"


def test_parameters_of_one_run_only_are_named():
    found = diff(history(layers=6), history(layers=4))
    assert found.only_a == (name(4), name(5))
    assert found.only_b == ()
    assert found.differs
    assert f"Tracked only in a: {name(4)}, {name(5)}" in str(found)


def test_a_gradient_that_points_along_the_weights_is_found_by_its_difference():
    found = diff(history(), history(odd=("radial",)))
    how = layer(found, 5).courses["grad_radial_share"]
    assert how.parted
    assert not how.is_ratio
    assert how.late == pytest.approx(-0.4, abs=1e-3)
    assert not layer(found, 0).courses["grad_radial_share"].parted
    said = f"The cosine of gradient and weights differs by -0.4 in {name(5)}."
    assert found.verdict[0] == said


def test_a_layer_that_parted_for_a_while_comes_before_those_that_never_did():
    def change(row):
        if 100 <= row["step"] <= 300:
            times(4, 3.0, 0, ["angle"])(row)

    found = diff(history(), history(change=change))
    assert found.layers[0].name == name(4)
    assert found.layers[0].since == 100
    assert found.verdict == (
        f"The runs differ in angles, in {name(4)}.",
        f"They part first at step 100, in {name(4)} (angles).",
    )


def test_a_metric_is_compared_too():
    def change(row):
        if row["step"] >= 600:
            row["metrics"]["loss"] *= 1.5
        row["metrics"]["score"] = -1.0

    found = diff(history(), history(change=change))
    loss, score = found.metrics
    assert loss.course.since == 600
    assert loss.course.parted
    assert loss.b[0] == pytest.approx(1.5 * loss.a[0])
    assert (score.a, score.course) == (None, None)
    assert found.verdict[-1].startswith("b's loss is 1.4x a's")


def test_logs_with_missing_probes_and_nulls_are_compared_in_what_they_have():
    def change(row):
        for entry in row["parameters"].values():
            del entry["angle"]
            if row["step"] % 3:
                entry["norm"] = dict.fromkeys(entry["norm"])

    found = diff(history(), history(change=change))
    assert set(layer(found, 0).courses) == {m.probe for m in MEASURES} - {"angle"}
    assert not any(one.parted for one in found.layers)
    assert any("only one log has: angle" in note for note in found.notes)


def test_zero_against_something_is_a_difference_and_against_zero_none():
    values = apart(np.array([0.0, 0.0, 1.0, np.nan]), np.array([0.0, 1.0, 0.0, 1.0]), True)
    assert values[0] == 0
    assert values[1] == -values[2] == math.log(1e9)
    assert np.isnan(values[3])


def test_a_course_is_dated_at_its_first_lasting_parting():
    brief, lasting = np.zeros(300), np.zeros(300)
    brief[100:110] = 1.0
    lasting[100:140] = 1.0
    one, two = (course(x, STEPS, half=150, tolerance=0.1) for x in (brief, lasting))
    assert (one.parted, one.since) == (False, None)
    assert one.largest_at in range(101, 111)
    assert (two.parted, two.since) == (True, 101)
    assert two.late == 1.0


def test_steady_growth_is_not_taken_for_noise():
    how = course(np.log(2) * STEPS / 300, STEPS, half=150, tolerance=0.1)
    assert how.since == pytest.approx(math.log(1.1) / math.log(2) * 300, abs=2)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 11])
def test_short_logs_are_compared_as_well(rows):
    steps = {"steps": 5 * rows, "layers": 2}
    assert diff(history(**steps), history(**steps)).same == "identical"
    found = diff(history(**steps), history(**steps, change=times(1, 2.0, 1, ["norm"])))
    assert [one.name for one in found.layers if one.parted] == [name(1)]


def test_json_is_read_back_as_it_was_written():
    found = diff(history(), history(odd=("nan", "radial"), weight_decay=2e-3))
    values = found.as_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["differs"] is True
    assert values["layers"][0]["name"] == found.layers[0].name
    assert values["layers"][0]["lost"] == {"run": "b", "step": 505}
    assert values["steps"] == {"count": 200, "first": 5, "last": 1000}


def test_lines_are_at_most_a_hundred_columns_and_ten_layers_are_shown():
    long = {name(i): "encoder.stage.block." * 3 + name(i) for i in range(30)}

    def rename(row):
        row["parameters"] = {long[key]: value for key, value in row["parameters"].items()}

    def change(row):
        for i in range(30):
            times(i, 1.5 + i / 10, 300, ["norm", "angle", "effective_lr"])(row)
        rename(row)

    found = diff(history(layers=30, change=rename), history(layers=30, change=change))
    text, whole = as_text(found), as_text(found, every=True)
    for shown in (text, whole):
        assert max(map(len, shown.splitlines())) <= 100
    assert "and 20 more layers; --all shows them" in text
    assert sum("conv.weight " in line for line in whole.splitlines()) >= 30
    assert "layer29.conv.weight" in text
    assert "layer0.conv.weight" not in text


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "x"])
def test_a_tolerance_that_is_no_positive_number_is_refused(value):
    with pytest.raises(ValueError, match=r"tolerance=.* must be a positive number"):
        diff(history(), history(), tolerance=value)
