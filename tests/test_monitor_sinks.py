"""Sinks: what dashboards are given, what opening refuses, and that none stops training."""

import csv
import json
import logging
import math
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from logs import PROBES, make_rows, make_run, name
from torch import nn

import sphereopt as so
from sphereopt.monitor.jsonl import JsonlSink, read_jsonl
from sphereopt.monitor.sinks import LogSink, ScalarSink, Sink, open_sink, scalars


class Run:
    """W&B's run in what matters here: steps never go back, and the dict is taken at once."""

    def __init__(self):
        self.history, self.step = [], -1

    def log(self, data, step=None, commit=None):
        assert step > self.step, "W&B drops what is logged for an earlier step"
        assert all(type(x) in (int, float) and math.isfinite(x) for x in data.values())
        self.step = step
        self.history.append((step, dict(data)))
        data.clear()


class Logger:
    """A Lightning logger: ``log_metrics(metrics, step)``."""

    def __init__(self):
        self.history = []

    def log_metrics(self, metrics, step=None):
        self.history.append((step, dict(metrics)))


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None):
        self.scalars.append((tag, scalar_value, global_step))


def test_dashboards_get_the_median_of_every_probe_in_one_call():
    rows = list(make_rows(50, 4, every=10, odd=["nan"]))
    run, logger, writer = Run(), Logger(), Writer()
    sink = open_sink([run, logger, writer])
    sink.start(make_run(4))
    for row in rows:
        sink(row)
    sink.close()
    assert [step for step, _ in run.history] == [10, 20, 30, 40, 50]
    assert run.history == logger.history
    assert writer.scalars == [(t, x, step) for step, data in run.history for t, x in data.items()]
    for row, (_, data) in zip(rows, run.history, strict=True):
        expected = {"sphereopt/metrics/loss": row["metrics"]["loss"]}
        for parameter, entry in row["parameters"].items():
            for probe in PROBES:
                if entry[probe]["median"] is not None:
                    expected[f"sphereopt/{probe}/{parameter}"] = entry[probe]["median"]
        assert data == expected
    assert f"sphereopt/norm/{name(3)}" in run.history[0][1]
    assert f"sphereopt/norm/{name(3)}" not in run.history[-1][1]  # null from half of the run on


def test_statistics_and_probes_can_be_chosen():
    (row,) = make_rows(1, 2)
    run = Run()
    LogSink(run, stats=["q25", "median"], probes=["angle"])(row)
    tags = ["sphereopt/metrics/loss"]
    tags += [f"sphereopt/angle/{name(i)}{end}" for i in range(2) for end in ("/q25", "")]
    assert list(run.history[0][1]) == tags
    for bad in ("median", ["q99"]):
        with pytest.raises(ValueError, match=r"stats=.* some of mean, min, q25"):
            ScalarSink(Writer(), stats=bad)


def test_tags_hold_only_what_every_dashboard_takes():
    entry = {"norm": {"median": 1.0}}
    row = {"step": 1, "parameters": {"a.w + b.w": entry, "group 0, parameter 1": entry}}
    found = [f"sphereopt/norm/{tail}" for tail in ("a.w_b.w", "group_0_parameter_1")]
    assert list(scalars(row)) == found


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_left_out(value):
    row = {
        "step": 1,
        "metrics": {"loss": value, "accuracy": 1},
        "parameters": {"w": {"norm": {"median": value}, "angle": {"mean": 1.0}}},
    }
    assert scalars(row) == {"sphereopt/metrics/accuracy": 1.0}
    run = Run()
    LogSink(run)({"step": 2, "parameters": row["parameters"]})
    assert run.history == []  # an empty call would still make a step on the dashboard


def test_tensorboard_reads_back_what_the_tracker_logged(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own, on import
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5))
    optimizer = so.SphereSGD(so.param_groups(model, {"0.weight": "row"}), lr=0.1)
    rows = []
    with SummaryWriter(tmp_path) as writer, so.track(optimizer, [writer, rows.append]) as tracker:
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(torch.randn(16, 6)) - 1).square().mean()
            loss.backward()
            tracker.log(loss=loss)
            optimizer.step()
    events = EventAccumulator(str(tmp_path)).Reload()
    probes = {
        k for row in rows for k, x in row["parameters"]["0.weight"].items() if type(x) is dict
    }
    assert {"norm", "angle"} <= probes
    for probe in probes:
        logged = [(r["step"], r["parameters"]["0.weight"].get(probe)) for r in rows]
        logged = [(step, x["median"]) for step, x in logged if x and math.isfinite(x["median"])]
        read = events.Scalars(f"sphereopt/{probe}/0.weight") if logged else []
        # Event files hold float32.
        assert [(e.step, e.value) for e in read] == [
            (step, pytest.approx(value, rel=1e-6, abs=1e-30)) for step, value in logged
        ]
    losses = [e.value for e in events.Scalars("sphereopt/metrics/loss")]
    assert losses == pytest.approx([row["metrics"]["loss"] for row in rows], rel=1e-6)
    assert len(losses) == 60


def test_a_failing_sink_warns_once_and_the_others_go_on(tmp_path):
    rows, path = [], tmp_path / "run.jsonl"

    def broken(row):
        raise ConnectionError("no route to host")

    layer = nn.Linear(3, 2, bias=False)
    optimizer = so.SphereSGD(layer.parameters(), lr=0.1, sphere="row")
    tracker = so.track(optimizer, [rows.append, broken, path])
    layer(torch.ones(1, 3)).square().sum().backward()
    message = r"broken failed at step 1, training goes on: ConnectionError: no route to host"
    with pytest.warns(RuntimeWarning, match=message):
        optimizer.step()
    for _ in range(3):
        optimizer.step()  # a second warning would be an error here
    tracker.close()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4]


def test_a_sink_that_recovers_goes_on(tmp_path):
    seen, trouble = [], [OSError("busy")]

    def flaky(row):
        if trouble:
            raise trouble.pop()
        seen.append(row["step"])

    sink = open_sink(flaky)
    with pytest.warns(RuntimeWarning, match="busy"):
        sink({"step": 1, "parameters": {}})
    sink({"step": 2, "parameters": {}})
    assert seen == [2]


def test_stopping_a_run_is_not_an_error_of_the_sink():
    def interrupt(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_sink(interrupt)({"step": 1, "parameters": {}})


def test_a_file_that_cannot_be_finished_is_a_warning_that_names_it(tmp_path):
    pytest.importorskip("pyarrow")
    sink = open_sink(tmp_path / "run.parquet")
    sink({"step": 1, "parameters": {}})
    (tmp_path / "run.jsonl").write_text("nonsense\n")
    with pytest.warns(
        RuntimeWarning, match=r"run\.parquet failed while closing: LogError: .*line 1"
    ):
        sink.close()


def test_a_file_that_failed_before_is_named_again_if_it_cannot_be_finished():
    class Broken:
        path = "run.parquet"

        def __call__(self, row):
            raise OSError("full")

    broken = Broken()
    sink = Sink([broken], owned=[broken])
    broken.close = lambda: broken(None)
    with pytest.warns(RuntimeWarning, match=r"run\.parquet failed at step 1"):
        sink({"step": 1, "parameters": {}})
    with pytest.warns(RuntimeWarning, match=r"run\.parquet failed while closing"):
        sink.close()


def test_only_what_was_opened_from_a_path_is_closed(tmp_path):
    class Mine:
        closed, runs = False, ()

        def __call__(self, row):
            pass

        def start(self, run):
            self.runs = (*self.runs, run)

        def close(self):
            self.closed = True

    mine, own = Mine(), JsonlSink(tmp_path / "own.jsonl")
    sink = open_sink([mine, own, str(tmp_path / "run.jsonl")])
    sink.start({"start": 0})
    sink.close()
    sink.close()
    assert not mine.closed
    assert mine.runs == ({"start": 0},)
    own({"step": 1})  # still open
    own.close()
    assert (tmp_path / "run.jsonl").read_text() == '{"run":{"start":0}}\n'


def test_bad_targets_say_what_would_do(tmp_path):
    for path in ("run.json", "run", "run.JSONL.gz"):
        with pytest.raises(ValueError, match=r"must end in \.jsonl, \.csv, \.parquet"):
            open_sink(tmp_path / path)
    with pytest.raises(TypeError, match="sink=3 must be a path, a callable, or an object with"):
        open_sink(3)
    with pytest.raises(TypeError, match=r"Logger\.log must take a dict and step="):
        open_sink(logging.getLogger("sphereopt"))
    with pytest.raises(ValueError, match=r"both write to .*run\.jsonl"):
        open_sink([tmp_path / "run.jsonl", rows_to_nowhere, str(tmp_path / "run.parquet")])
    with pytest.raises(ValueError, match=r"both write to .*run\.csv"):
        open_sink([tmp_path / "run.csv", tmp_path / "x" / ".." / "run.csv"])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        open_sink(tmp_path / "folder.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.jsonl"]


def rows_to_nowhere(row):
    pass


def test_opening_fails_as_a_whole(tmp_path):
    # An unclosed file would be a ResourceWarning, and an error here.
    with pytest.raises(TypeError):
        open_sink([tmp_path / "a.jsonl", 3])
    (tmp_path / "b.csv").write_text("step,metric,value,parameter\n")
    sink = open_sink([tmp_path / "a.jsonl", tmp_path / "b.csv"])
    with pytest.raises(ValueError, match=r"b\.csv: has the columns of another log"):
        sink.start(make_run(1))


def test_the_dict_of_a_row_reaches_callables_as_it_is():
    (row,) = make_rows(1, 1)
    rows = []
    Sink([rows.append])(row)
    assert rows[0] is row


def test_lightning_loggers_take_the_rows(tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(tmp_path)
    sink = open_sink(logger)
    rows = list(make_rows(30, 2, every=10))
    for row in rows:
        sink(row)
    logger.save()
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [10, 20, 30]
    for line, row in zip(lines, rows, strict=True):
        expected = row["parameters"][name(1)]["norm"]["median"]
        assert float(line[f"sphereopt/norm/{name(1)}"]) == expected


class Tracking(Run):
    """What the page imports as wandb and mlflow."""

    def __init__(self):
        super().__init__()
        self.metrics = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def define_metric(self, name, step_metric):
        self.metrics[name] = step_metric

    def log(self, data, step=None, commit=None):
        super().log(data, self.step + 1 if step is None else step)


def test_the_page_runs_as_it_is_written(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    runs = []
    wandb, mlflow = types.ModuleType("wandb"), types.ModuleType("mlflow")
    wandb.init = lambda project: runs.append(Tracking()) or runs[-1]
    mlflow.start_run, mlflow.calls = Tracking, []
    mlflow.log_metrics = lambda metrics, step=None: mlflow.calls.append((step, metrics))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    layer = nn.Linear(3, 2, bias=False)

    def train(model, optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()

    optimizer = so.SphereSGD([("w", layer.weight)], lr=0.1, sphere="row")
    names = {"so": so, "opt": optimizer, "model": layer, "train": train}
    page = (Path(__file__).parents[1] / "docs" / "sinks.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, names)
    assert len(names["rows"]) == 20
    assert names["history"].of("angle", "q75").shape == (20, 1)
    assert [step for step, _ in mlflow.calls] == [10, 20]
    plain, chosen, joined = runs
    assert [step for step, _ in plain.history] == [10, 20]
    assert set(chosen.history[0][1]) == {
        f"sphereopt/{probe}/w{end}" for probe in ("norm", "angle") for end in ("", "/max")
    }
    assert [data["sphereopt/step"] for _, data in joined.history] == list(range(1, 21))
    files = {"run.jsonl", "run.csv", "norms.jsonl", "norms.parquet", "table.parquet"}
    files |= {"other.jsonl", "tensorboard"}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_the_page_quotes_its_measurements():
    docs = Path(__file__).parents[1] / "docs"
    measured = json.loads((docs / "results" / "log_reading.json").read_text())
    page = (docs / "sinks.md").read_text()
    assert f"logs of {measured['megabytes'] // 1000} GB" in page
    for log in measured["logs"]:
        layers = "one layer" if log["layers"] == 1 else f"{log['layers']} layers"
        cells = [f"{log['history']['rows']:,} rows of {layers}"]
        for how in ("history", "parquet"):
            cells.append(f"{log[how]['seconds']:.0f} s, {log[how]['megabytes']} MB")
        assert f"| {' | '.join(cells)} |" in page
