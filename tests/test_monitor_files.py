"""Log files: crashes, full disks, resumes; the same numbers from JSON lines, CSV and Parquet."""

import csv
import errno
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from logs import ODD, PROBES, make_rows, make_run, write_log

import sphereopt as so
from sphereopt.monitor.jsonl import JsonlSink, iterate, read_jsonl
from sphereopt.monitor.table import CsvSink, ParquetSink, columns, to_parquet

TRAINING = """
import os, sys, torch, sphereopt as so
from sphereopt.monitor.jsonl import JsonlSink
path, start, stop, life, cut = sys.argv[1], *map(int, sys.argv[2:])
model = torch.nn.Sequential(torch.nn.Linear(40, 40, bias=False), torch.nn.BatchNorm1d(40))
optimizer = so.SphereSGD(so.param_groups(model, {"0.weight": "row"}), lr=0.1)
sink = JsonlSink(path)
if cut:
    whole = sink._file._file
    class Cut:
        def __getattr__(self, name):
            return getattr(whole, name)
        def write(self, line):
            if b'"step":%d,' % cut not in line:
                return whole.write(line)
            whole.write(line[: len(line) // 2])
            os.kill(os.getpid(), 9)
    sink._file._file = Cut()
with so.track(optimizer, sink, start=start) as tracker:
    for step in range(start + 1, stop + 1):
        optimizer.zero_grad()
        model(torch.randn(8, 40)).square().mean().backward()
        tracker.log(life=life)
        optimizer.step()
        os.write(1, b"%d\\n" % step)
"""


def live(path, start, stop, life, *, cut=0, kill_after=None):
    """Train in a process of its own, perhaps to its death; return the last step it had logged."""
    argv = [sys.executable, "-c", TRAINING, str(path), *map(str, (start, stop, life, cut))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(so.__file__).parents[1]) as child:
        steps = 0
        for line in child.stdout:
            steps = int(line)
            if kill_after is not None and steps >= start + kill_after:
                time.sleep(random.uniform(0, 0.005))
                child.kill()
                kill_after = None
    assert child.returncode == (0 if steps == stop else -signal.SIGKILL)
    return steps


def test_a_killed_run_has_logged_every_step_it_made_and_resumes(tmp_path):
    path = tmp_path / "run.jsonl"
    first = live(path, 0, 10**6, 1, kill_after=20)
    rows = read_jsonl(path)
    # Killed between the row and the message, it may have logged one more than it told.
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert first <= len(rows) <= first + 1
    # From a checkpoint of some steps earlier, killed in the middle of writing step 40.
    assert live(path, 15, 10**6, 2, cut=40) == 39
    assert not path.read_bytes().endswith(b"\n")
    assert read_jsonl(path)[-1]["step"] == 39
    assert live(path, 39, 45, 3) == 45
    rows = read_jsonl(path)
    assert [row["step"] for row in rows] == list(range(1, 46))
    lives = [row["metrics"]["life"] for row in rows]
    assert lives == [1] * 15 + [2] * 24 + [3] * 6
    runs = [found["run"] for _, found in iterate(path) if "run" in found]
    assert [run["start"] for run in runs] == [0, 15, 39]


def test_what_is_not_a_number_is_null_and_reads_as_nothing(tmp_path):
    sink = JsonlSink(tmp_path / "run.jsonl")
    bad = {"max": math.nan, "min": -math.inf, "median": 1.0}
    sink({"step": 1, "metrics": {"loss": math.inf}, "parameters": {"w": {"norm": bad}}})
    sink.close()
    assert sink.path.read_bytes() == (
        b'{"step":1,"metrics":{"loss":null},'
        b'"parameters":{"w":{"norm":{"max":null,"min":null,"median":1.0}}}}\n'
    )


class Full:
    """A file on a disk with room for so many bytes, as the operating system shows it."""

    def __init__(self, file, room, takes_back=True):
        self.file, self.room, self.takes_back = file, room, takes_back

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, line):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(line[: self.room])
        self.room -= written
        return written

    def truncate(self, size):
        if not self.takes_back:
            raise OSError(errno.EIO, "Input/output error")
        self.room += self.file.seek(0, 2) - size
        return self.file.truncate(size)


@pytest.mark.parametrize("takes_back", [True, False])
def test_a_full_disk_leaves_no_half_line_behind(tmp_path, takes_back):
    sink = JsonlSink(tmp_path / "run.jsonl")
    sink({"step": 1})
    disk = sink._file._file = Full(sink._file._file, 5, takes_back)
    for _ in range(3):
        with pytest.raises(OSError, match=r"No space|Input/output"):
            sink({"step": 2})
    if takes_back:
        assert sink.path.read_bytes() == b'{"step":1}\n'
    assert read_jsonl(sink.path) == [{"step": 1}]
    disk.room, disk.takes_back = 1000, True
    sink({"step": 3})
    sink.close()
    assert sink.path.read_bytes() == b'{"step":1}\n{"step":3}\n'


def test_a_real_full_disk_is_an_error_and_not_a_hang():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    sink = JsonlSink.__new__(JsonlSink)
    sink._file = so.monitor.lines.LineFile.__new__(so.monitor.lines.LineFile)
    with open("/dev/full", "ab+", buffering=0) as file:
        sink._file._file, sink._file._torn = file, False
        with pytest.raises(OSError, match="No space left"):
            sink({"step": 1})


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        (b'{"step":3,"par', b""),
        (b"\0" * 5000, b""),
        (b'{"step":3,"a\0\0\0', b""),
        (b'{"step":3}', b'{"step":3}\n'),  # whole: only its newline is missing
        (b'{"step":3,"a":"' + b"x" * 200_000, b""),
    ],
    ids=["half", "zeros", "half and zeros", "whole", "long"],
)
def test_reading_and_continuing_agree_on_the_last_line(tmp_path, last, kept):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"step":2}\n' + last)
    seen = read_jsonl(path)
    JsonlSink(path).close()
    assert path.read_bytes() == b'{"step":2}\n' + kept
    assert read_jsonl(path) == seen


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04weights" * 100,
        b'{"text": "a training example"}\n' * 3,
        b"step,loss\n1,0.3\n",
        b'{\n "results": 1\n}\n',
    ],
    ids=["binary", "data", "csv", "json"],
)
@pytest.mark.parametrize("kind", [JsonlSink, CsvSink, ParquetSink])
def test_what_is_not_a_log_is_left_as_it_is(tmp_path, content, kind):
    if kind is ParquetSink:
        pytest.importorskip("pyarrow")
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    target = path.with_suffix(".parquet") if kind is ParquetSink else path
    with pytest.raises(ValueError, match=r"run\.jsonl: holds something else than a log"):
        kind(target)
    assert path.read_bytes() == content


def written(path):
    rows = list(make_rows(60, 9, every=10, odd=ODD))
    for sink in (CsvSink(path / "run.csv"), ParquetSink(path / "run.parquet")):
        sink.start(make_run(9))
        for row in rows:
            sink(row)
        sink.close()
    return rows


def number(text):
    return None if text == "" else float(text)


def test_csv_and_parquet_hold_what_the_rows_held(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = written(tmp_path)
    with (tmp_path / "run.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    table = parquet.read_table(tmp_path / "run.parquet").to_pylist()
    assert list(lines[0]) == columns([*PROBES, "diffusive_angle"])
    assert list(table[0]) == list(lines[0])
    expected = iter(zip(lines, table, strict=True))
    for row in rows:
        line, entry = next(expected)
        assert (line["metric"], number(line["value"])) == ("loss", row["metrics"]["loss"])
        assert (entry["metric"], entry["value"]) == ("loss", row["metrics"]["loss"])
        assert line["parameter"] == ""
        assert entry["parameter"] is None
        for name, about in row["parameters"].items():
            line, entry = next(expected)
            assert (int(line["step"]), line["parameter"]) == (row["step"], name)
            assert (entry["step"], entry["parameter"]) == (row["step"], name)
            assert (line["sphere"], line["kind"]) == (entry["sphere"], entry["kind"])
            assert int(line["count"]) == entry["count"] == about["count"]
            assert number(line["lr"]) == entry["lr"] == about["lr"]
            for probe in PROBES:
                for stat in ("mean", "min", "q25", "median", "q75", "max"):
                    value = about.get(probe, {}).get(stat)
                    assert number(line[f"{probe}.{stat}"]) == value
                    assert entry[f"{probe}.{stat}"] == value
    assert next(expected, None) is None


def test_csv_is_continued_with_the_same_columns_and_refused_with_others(tmp_path):
    path = tmp_path / "deep" / "run.csv"
    for start in (0, 20):
        sink = CsvSink(path)
        sink.start(make_run(3, start=start))
        for row in make_rows(20, 3, every=10, start=start, total=40):
            sink(row)
        if start == 0:
            sink._file.append(b"30,,,layer0.conv")  # as a crash would
        sink.close()
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(x["step"]) for x in lines if x["metric"]] == [10, 20, 30, 40]
    assert len(lines) == 4 * 4
    assert path.read_text().count("parameter") == 1
    before = path.read_bytes()
    with pytest.raises(
        ValueError,
        match=r"run\.csv: has the columns of another log \(only it has K_.*; it lacks weird\)",
    ):
        CsvSink(path).start(make_run(3, probes=["norm", "weird"]))
    with pytest.raises(ValueError, match="in another order"):
        CsvSink(path).start(make_run(3, probes=["diffusive_angle", *PROBES]))
    assert path.read_bytes() == before


def test_a_csv_without_a_header_takes_the_columns_of_its_first_row(tmp_path):
    sink = CsvSink(tmp_path / "run.csv")
    entry = {"sphere": "row", "norm": {"mean": math.inf, "median": 2.0}}
    sink({"step": 1, "parameters": {'a "b", c': entry}})
    with pytest.raises(ValueError, match="has no columns for angle"):
        sink({"step": 2, "parameters": {"w": {"angle": {"median": 0.1}}}})
    sink.close()
    with sink.path.open(newline="") as file:
        line = next(csv.DictReader(file))
    assert (line["parameter"], line["norm.mean"], line["norm.median"]) == ('a "b", c', "", "2.0")


def test_parquet_leaves_out_what_a_resumed_run_made_again(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for start, stop in ((0, 50), (20, 80)):
        sink = ParquetSink(tmp_path / "run.parquet")
        sink.start(make_run(3, start=start))
        for row in make_rows(stop - start, 3, every=10, start=start, total=80, loss=False):
            sink({**row, "metrics": {"first": float(start)}})
        sink.close()
        made = sink.path.stat().st_ino
        sink.close()
        assert sink.path.stat().st_ino == made  # not written a second time
    table = parquet.read_table(tmp_path / "run.parquet").to_pylist()
    firsts = [(line["step"], line["value"]) for line in table if line["metric"]]
    assert firsts == [(10, 0), (20, 0), *((step, 20) for step in range(30, 81, 10))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.jsonl", "run.parquet"]


def test_parquet_appears_when_it_is_complete(tmp_path):
    pytest.importorskip("pyarrow")
    log = write_log(tmp_path / "run.jsonl", make_rows(30, 3, every=10))
    path = tmp_path / "run.parquet"
    to_parquet(log, path)
    before = path.read_bytes()
    with log.open("a") as file:
        file.write('{"step": 40, "parameters": {"w": {"norm": {"median": "much"}}}}\n')
    with pytest.raises(so.monitor.jsonl.LogError, match=r"line 4, parameter w: norm is \{'median"):
        to_parquet(log, path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.jsonl", "run.parquet"]


def test_a_file_that_is_not_our_table_is_not_replaced(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    log = write_log(tmp_path / "log.jsonl", make_rows(30, 3, every=10))
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "data.parquet")
    (tmp_path / "text.parquet").write_text("precious")
    for path in (tmp_path / "data.parquet", tmp_path / "text.parquet", log):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=rf"{path.name}: holds something else than a log"):
            to_parquet(log, path)
        with pytest.raises(ValueError, match=rf"{path.name}: holds something else than a log"):
            ParquetSink(path)
        assert path.read_bytes() == before
    assert not (tmp_path / "data.jsonl").exists()


def test_parquet_of_many_lines_is_written_in_batches(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(so.monitor.table, "_BATCH", 7)
    log = write_log(tmp_path / "run.jsonl", make_rows(50, 3, every=10))
    to_parquet(log, tmp_path / "run.parquet")
    file = parquet.ParquetFile(tmp_path / "run.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [7, 7, 6]
    assert file.read().column("step").to_pylist() == [
        s for s in (10, 20, 30, 40, 50) for _ in "1234"
    ]


def test_without_pyarrow_the_extra_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pip install "sphereopt\[parquet\]"'):
        ParquetSink(tmp_path / "run.parquet")
    assert not list(tmp_path.iterdir())


def test_two_sinks_may_write_to_one_file(tmp_path):
    one, other = (JsonlSink(tmp_path / "run.jsonl") for _ in range(2))
    for step in range(1, 4):
        one({"step": step, "parameters": {"a": {}}})
        other({"step": step, "parameters": {"b": {}}})
    one.close()
    other.close()
    expected = [{"step": step, "parameters": {"a": {}, "b": {}}} for step in range(1, 4)]
    assert read_jsonl(tmp_path / "run.jsonl") == expected


def test_a_log_of_two_optimizers_is_read_as_one(tmp_path):
    both = []
    for seed in (0, 1):
        rows = list(make_rows(40, 2, every=10, seed=seed))
        both.append(rows)
    names = {"layer0.conv.weight": "a", "layer1.conv.weight": "b"}
    for row in both[1]:
        row["parameters"] = {names[n]: entry for n, entry in row["parameters"].items()}
        row["metrics"] = {"other": 1.0}
    path = write_log(
        tmp_path / "run.jsonl", [row for pair in zip(*both, strict=True) for row in pair]
    )
    rows = read_jsonl(path)
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert list(rows[0]["parameters"]) == ["layer0.conv.weight", "layer1.conv.weight", "a", "b"]
    assert list(rows[0]["metrics"]) == ["loss", "other"]
    # Both resume after step 20.
    write_log(path, [row for pair in zip(*both, strict=True) for row in pair][4:], append=True)
    assert read_jsonl(path) == rows
    assert json.loads(path.read_text().splitlines()[0])["parameters"].keys() == set(names)
