"""Reading logs: arrays that hold what was logged, bounded memory, and errors that name the line."""

import gzip
import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from logs import ODD, PROBES, STATS, make_rows, make_run, name, write_log

import sphereopt as so
from sphereopt.monitor.jsonl import LogError, iterate, read_jsonl
from sphereopt.monitor.rows import Rows
from sphereopt.report import history
from sphereopt.report.history import History, as_history


def value(row, parameter, probe, stat):
    """What a row says, NaN where it says nothing: the plain way."""
    found = row["parameters"].get(parameter, {}).get(probe, {}).get(stat)
    return np.nan if found is None else found


def same(found, rows, names):
    """Compare a history with the rows it should hold."""
    assert found.steps.tolist() == [row["step"] for row in rows]
    for probe in found.values:
        expected = [[[value(r, n, probe, s) for s in STATS] for n in names] for r in rows]
        np.testing.assert_array_equal(found.values[probe], expected)
    for key in ("lr", "weight_decay"):
        expected = [[r["parameters"].get(n, {}).get(key, np.nan) for n in names] for r in rows]
        np.testing.assert_array_equal(found.settings[key], expected)


# Arrays


def test_a_history_holds_every_number_of_the_log(tmp_path):
    rows = list(make_rows(60, 9, every=2, odd=ODD))
    path = write_log(tmp_path / "run.jsonl", rows, [make_run(9)])
    found = History.read(path)
    late = name(7)
    assert ODD[5] == "late"
    names = [*(name(i) for i in range(9) if i != 7), late]
    assert found.names == tuple(names)
    assert tuple(found.values) == PROBES
    same(found, rows, names)
    assert found.metrics["loss"].tolist() == [row["metrics"]["loss"] for row in rows]
    assert found.runs == (make_run(9),)
    assert found.about[late] == {"sphere": "row", "kind": "proved", "count": 128}
    assert (found.source, found.logged, found.notes) == (str(path), 30, ())
    for stat in STATS:
        np.testing.assert_array_equal(
            found.of("angle", stat), found.values["angle"][:, :, STATS.index(stat)]
        )


def test_path_rows_and_history_are_the_same_log(tmp_path):
    rows = list(make_rows(20, 2))
    path = write_log(tmp_path / "run.jsonl", rows)
    for log in (path, str(path), rows, tuple(rows), iter(rows), History.from_rows(rows)):
        same(as_history(log), rows, [name(0), name(1)])
    found = History.from_rows(rows, [make_run(2)])
    assert as_history(found) is found
    assert found.runs == (make_run(2),)
    assert found.source == "rows"


def test_what_comes_and_goes_is_nan_where_it_is_absent():
    table = {"median": 1.0}
    rows = [
        {"step": 1, "parameters": {"a": {"norm": table}}},
        {"step": 2, "metrics": {"loss": 0.5}, "parameters": {}},
        {"step": 3, "parameters": {"b": {"angle": table, "lr": 0.1}, "a": {"angle": {}}}},
        {"step": 4, "metrics": {"loss": None, "accuracy": 1}, "parameters": {"a": {"norm": table}}},
    ]
    found = History.from_rows(rows)
    assert found.names == ("a", "b")
    assert tuple(found.values) == ("norm", "angle")
    same(found, rows, ["a", "b"])
    np.testing.assert_array_equal(found.metrics["loss"], [np.nan, 0.5, np.nan, np.nan])
    np.testing.assert_array_equal(found.metrics["accuracy"], [np.nan, np.nan, np.nan, 1.0])
    with pytest.raises(KeyError, match=r"probe='growth' was not logged; there are norm, angle"):
        found.of("growth")
    with pytest.raises(KeyError, match="stat='q50' must be one of mean"):
        found.of("norm", "q50")


# What resumed runs made again


def survivors(rows):
    """The rows that count, by the rule's own words: a step not beyond the last takes back."""
    kept = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_superseded_rows_are_left_out_however_often_runs_resume(tmp_path, seed):
    draw, rows, step = random.Random(seed), [], 0
    for life in range(draw.randint(1, 8)):
        step = draw.randint(0, step)
        for _ in range(draw.randint(0, 30)):
            step += draw.randint(1, 3)
            rows.append({"step": step, "metrics": {"life": life}, "parameters": {"w": {}}})
    rows.append({"step": step + 1, "parameters": {"w": {}}})
    path, expected = write_log(tmp_path / "run.jsonl", rows), survivors(rows)
    assert read_jsonl(path) == expected
    for log in (path, rows):
        found = as_history(log)
        assert found.steps.tolist() == [row["step"] for row in expected]
        assert found.logged == len(expected)
        count = len(rows) - len(expected)
        assert any(f"{count} row" in note for note in found.notes) == (count > 0)


def test_what_each_of_several_optimizers_makes_again_supersedes():
    steps = [(1, "a"), (1, "b"), (1, "c"), (2, "a"), (2, "b"), (2, "c"), (2, "b"), (2, "a")]
    rows = [{"step": s, "parameters": {n: {"lr": i}}} for i, (s, n) in enumerate(steps)]
    found = [(row["step"], row["parameters"]) for _, row in Rows(rows)]
    first = {n: {"lr": i} for i, n in enumerate("abc")}
    # The second b starts step 2 anew, and with it all who take part in it.
    assert found == [(1, first), (2, {"b": {"lr": 6}, "a": {"lr": 7}})]


@pytest.mark.parametrize("spaced", [False, True])
def test_lines_written_by_others_are_read_alike(tmp_path, spaced):
    rows = [{"parameters": {"w": {}}, "step": step} for step in (1, 2, 3, 2, 3, 4)]
    separators = (", ", " : ") if spaced else (",", ":")
    path = tmp_path / "run.jsonl"
    text = "\r\n\r\n".join(json.dumps(row, separators=separators) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as an editor on Windows may leave it
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4]
    assert History.read(path).notes == ("2 rows superseded: a resumed run made these steps again",)


def test_headers_between_rows_belong_to_the_log_and_not_to_its_rows(tmp_path):
    path = write_log(tmp_path / "run.jsonl", make_rows(4, 1, total=8), [make_run(1)])
    write_log(path, make_rows(6, 1, start=2, total=8), [make_run(1, start=2)], append=True)
    assert [row["step"] for row in read_jsonl(path)] == list(range(1, 9))
    found = History.read(path)
    assert [run["start"] for run in found.runs] == [0, 2]
    assert found.logged == 8


def test_a_run_that_goes_on_writing_is_read_as_far_as_it_was(tmp_path):
    path = write_log(tmp_path / "run.jsonl", make_rows(4, 1, total=8))
    stream = iter(Rows(path))
    first = next(stream)[1]["step"]
    write_log(path, make_rows(6, 1, start=2, total=8), append=True)
    assert [first, *(row["step"] for _, row in stream)] == [1, 2, 3, 4]


# Bounded memory


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 100, 1000])
def test_a_thinned_log_keeps_every_kth_row_the_first_and_the_last(monkeypatch, count):
    rows = list(make_rows(count, 2, odd=["nan"]))
    width = 2 * (len(PROBES) * 6 + 2) + 1 + history._OVERHEAD
    monkeypatch.setattr(history, "BUDGET", 16 * width)
    found = History.from_rows(rows)
    stride = 1
    while (count + stride - 1) // stride > 16:
        stride *= 2
    expected = rows[::stride] + ([] if (count - 1) % stride == 0 else rows[-1:])
    assert found.steps.tolist() == [row["step"] for row in expected]
    assert found.logged == count
    note = f"thinned: one row in {stride} is shown, and the last"
    assert found.notes == ((note,) if stride > 1 else ())
    assert found.metrics["loss"].tolist() == [row["metrics"]["loss"] for row in expected]
    rates = [row["parameters"][name(0)]["lr"] for row in expected]
    assert found.settings["lr"][:, 0].tolist() == rates
    # Where the held row has a number it is the row's own; "nan" is null late in the run.
    for i, row in enumerate(expected):
        for j in range(2):
            own = [value(row, name(j), "norm", stat) for stat in STATS]
            if not np.isnan(own).any():
                np.testing.assert_array_equal(found.values["norm"][i, j], own)


@pytest.mark.parametrize("period", [2, 3, 7])
@pytest.mark.parametrize("phase", [0, 1])
def test_thinning_does_not_lose_what_is_measured_now_and_then(monkeypatch, period, phase):
    table = dict.fromkeys(STATS, 1.0)
    rows = [{"step": i, "parameters": {"w": {"norm": table}}} for i in range(1, 401)]
    for row in rows[phase::period]:
        row["parameters"]["w"]["diffusive_angle"] = dict.fromkeys(STATS, float(row["step"]))
    monkeypatch.setattr(history, "BUDGET", 20 * (2 * 6 + 2 + history._OVERHEAD))
    found = History.from_rows(rows)
    stride = int(found.steps[1] - found.steps[0])
    assert stride == 32
    angles = found.of("diffusive_angle")[:, 0]
    assert np.isfinite(angles[:-1]).all()
    # Taken from the held row or the next that has one, before the next held row.
    assert (angles[:-1] >= found.steps[:-1]).all()
    assert (angles[:-1] < found.steps[:-1] + period).all()


def test_superseding_while_thinning_keeps_the_first_and_the_last(monkeypatch):
    monkeypatch.setattr(history, "BUDGET", 20 * (2 + history._OVERHEAD))
    steps = [*range(1, 301), *range(101, 201), *range(150, 351)]
    found = History.from_rows([{"step": s, "parameters": {"w": {}}} for s in steps])
    assert found.logged == 350
    assert (found.steps[0], found.steps[-1]) == (1, 350)
    assert set(np.diff(found.steps[:-1]).tolist()) == {32}
    assert found.notes[0].startswith("251 rows superseded")


def test_a_row_that_alone_is_too_large_is_an_error(monkeypatch):
    monkeypatch.setattr(history, "BUDGET", 1000)
    with pytest.raises(
        LogError, match=r"rows, row 1: too large .*50 parameters, 13 probes.*names="
    ):
        History.from_rows(make_rows(1, 50))


READING = """
import resource, sys
from sphereopt.report.history import History, BUDGET
import sphereopt.report.history as history
history.BUDGET = 500_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = History.read(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(found.logged, len(found.steps), (after - before) * 1024)
"""


def test_a_large_log_is_read_in_bounded_memory(tmp_path):
    pytest.importorskip("resource")
    lines = [json.dumps(row).partition(",")[2] for row in make_rows(50, 20)]
    path, count = tmp_path / "run.jsonl", 0
    with path.open("w") as file:
        while file.tell() < 60e6:
            count += 1
            file.write(f'{{"step": {count},{lines[count % 50]}\n')
    argv = [sys.executable, "-c", READING, str(path)]
    root = Path(so.__file__).parents[1]
    out = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=root).stdout
    logged, held, grown = map(int, out.split())
    assert logged == count
    assert held * (20 * (13 * 6 + 2) + 1) < 500_000
    # Half a million numbers are 4 MB, twice that while they are copied; the rest is the
    # interpreter's own. The rows in memory would be above 100 MB.
    assert grown < 30e6


# Errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"step":1}\nnonsense\n', "line 2: not JSON (Expecting value at character 1): nonsense"),
        (b'{"step":1}\n[1, 2]\n', "line 2: an array where a JSON object belongs"),
        (b"0.3", "line 1: a value where a JSON object belongs"),
        (b"step,loss\n", "line 1: not JSON"),
        (b"step,loss", "line 1: not JSON"),
        (b'\n{"step":1}\n{"step":2,"pa\n{"step":3}\n', "line 3: cut off after 13 characters"),
        (b'{"step":1,\n{"step":3}\n', "line 1: cut off after 10 characters, with more lines"),
        (b'{"step":1}\n\0\0\0\0\n{"step":3}\n', "line 2: holds NUL bytes"),
        (b"\x80\x05weights\n", "line 1: not UTF-8 (byte 1); is this a binary file?"),
        ('{"n":"é"}\n'.encode("latin-1"), "line 1: not UTF-8 (byte 7)"),
        ('{"step":1}\n'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (gzip.compress(b'{"step":1}\n'), "is compressed by gzip; unpack it first"),
        (b"PAR1" + b"\0" * 99, "is a Parquet file; the log is the .jsonl beside it"),
        (b"PK\3\4" + b"\0" * 99, "is a zip archive"),
        (b"[" * 10**6 + b"\n", "line 1: nested too deeply"),
        (b'{"step":' + b"9" * 5000 + b"}\n", "line 1: not JSON (Exceeds the limit"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    for read in (lambda: list(iterate(path)), lambda: read_jsonl(path), lambda: History.read(path)):
        with pytest.raises(LogError) as error:
            read()
        assert str(error.value).startswith(f"{path}")
        assert message in str(error.value)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"epoch": 1, "loss": 2}, 'not a row of sphereopt: needs "step" and "parameters", has "ep'),
        ({}, "has nothing"),
        ({"step": 1, "loss": 2}, 'has "step", "loss"'),
        ({"step": 1.5, "parameters": {}}, "the step is 1.5, not a whole number"),
        ({"step": True, "parameters": {}}, "the step is True"),
        ({"step": "7", "parameters": {}}, "the step is '7'"),
        ({"step": -1, "parameters": {}}, "the step is -1"),
        ({"step": 2**63, "parameters": {}}, "the step is 9223372036854775808"),
        ({"step": 1, "parameters": []}, "the parameters are [], not a table"),
        ({"step": 1, "parameters": {"w": 3}}, "parameter w: 3 is not a table of probes"),
        ({"step": 1, "parameters": {"w": {"norm": 3}}}, "w: norm is 3, not a table of numbers"),
        ({"step": 1, "parameters": {"w": {"norm": {"max": "3"}}}}, "norm is {'max': '3'}, not a"),
        ({"step": 1, "parameters": {"w": {"norm": {"max": True}}}}, "norm is {'max': True}"),
        ({"step": 1, "parameters": {"w": {"lr": "fast"}}}, "w: lr is 'fast', not a number"),
        ({"step": 1, "parameters": {"w": {"sphere": 2}}}, "w: sphere is 2, not a string"),
        ({"step": 1, "parameters": {}, "metrics": {"a": "b"}}, "the metrics are {'a': 'b'}"),
        ({"step": 1, "parameters": {"w": {"norm": {"max": 10**400}}}}, "a number is out of range"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_no_row_is_named_with_its_line(tmp_path, line, message):
    good = {"step": 0, "parameters": {}}
    path = write_log(tmp_path / "run.jsonl", [good, line])
    with pytest.raises(LogError) as error:
        History.read(path)
    assert str(error.value).startswith(f"{path}, line 2")
    assert message in str(error.value)
    with pytest.raises(LogError, match="rows, row 2"):
        History.from_rows([good, line])


def test_a_log_without_rows_says_so(tmp_path):
    path = tmp_path / "run.jsonl"
    for content, message in (
        (b"", "is empty: no step was logged yet"),
        (b"\n\n", "is empty"),
        (b'{"run":{}}\n', "holds headers but no rows"),
        (b'{"run":{}}\n{"step":1,"pa', "holds headers but no rows"),
    ):
        path.write_bytes(content)
        assert read_jsonl(path) == []
        with pytest.raises(LogError, match=rf"run\.jsonl: {message}"):
            History.read(path)
    with pytest.raises(LogError, match="rows: is empty"):
        History.from_rows([])


def test_a_path_that_is_no_file_says_so(tmp_path):
    with pytest.raises(LogError, match="No such file or directory"):
        History.read(tmp_path / "run.jsonl")
    with pytest.raises(LogError, match="Is a directory"):
        History.read(tmp_path)


def test_a_half_written_last_line_is_noted(tmp_path):
    path = write_log(tmp_path / "run.jsonl", make_rows(3, 1))
    with path.open("ab") as file:
        file.write(b'{"step":4,"parameters":{"w":\xc3')  # cut within a character, too
    found = History.read(path)
    assert found.steps.tolist() == [1, 2, 3]
    assert found.notes == ("a half-written last line is left out",)


def test_an_endless_line_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(so.monitor.rows, "LONGEST_LINE", 2**20)
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"step":1}\n{"x":"' + b"x" * 20 * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(LogError, match=r"run\.jsonl, line 2: longer than 1 MiB, so not a log"):
            read_jsonl(path)
        # The line as far as it was read, and the pieces it was read in.
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
