"""The tracker where training is not a plain loop: scalers, closures, compile, several processes."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import monitor_ranks
import pytest
import torch
from readings import Readings
from small_model import model_and_groups, train_step
from torch import nn

import sphereopt as so

KINDS = [so.SphereSGD, torch.optim.SGD]


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_make_one_step(kind):
    logs = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model, groups = model_and_groups()
        model.eval()  # BatchNorm's own averages: a batch is then the mean of its parts
        optimizer, rows = kind(groups, lr=0.1), []
        data = [torch.randn(16, 6) for _ in range(3)]
        with so.track(optimizer, rows.append):
            for x in data:
                optimizer.zero_grad()
                for part in x.chunk(parts):
                    (model(part).pow(4).mean() / parts).backward()
                optimizer.step()
        logs.append(rows)
    assert [row["step"] for row in logs[1]] == [1, 2, 3]
    for whole, accumulated in zip(*logs, strict=True):
        for name, entry in whole["parameters"].items():
            got = accumulated["parameters"][name]
            assert got["angle"] == pytest.approx(entry["angle"], rel=1e-4)  # float32 sums


@pytest.mark.parametrize("kind", [so.SphereAdam, torch.optim.AdamW, "fused"])
def test_steps_that_a_grad_scaler_skips_are_no_steps(kind):
    """Also where the optimizer itself skips, as torch's fused ones do; gradients are unscaled."""
    logs = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model, groups = model_and_groups()
        optimizer = (
            kind(groups, 0.01) if kind != "fused" else torch.optim.AdamW(groups, 0.01, fused=True)
        )
        scaler, rows = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled), []
        with so.track(optimizer, rows.append, window=0):
            for i in range(6):
                x = torch.randn(16, 6)
                if i in (2, 3) and not scaled:
                    continue
                optimizer.zero_grad()
                loss = model(x).pow(4).mean()
                scaler.scale(loss * (float("inf") if i in (2, 3) else 1)).backward()
                scaler.step(optimizer)
                scaler.update()
        logs.append(rows)
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4]
    for plain, got in zip(*logs, strict=True):
        for name, entry in plain["parameters"].items():
            for probe in ("angle", "scaled_grad_norm", "norm"):
                # Scaled and unscaled float32 gradients round alike but for underflow.
                want = entry[probe]["median"]
                assert got["parameters"][name][probe]["median"] == pytest.approx(want, rel=1e-4)


def test_gradients_that_a_closure_makes_are_those_of_the_step():
    for kind in KINDS:
        model, groups = model_and_groups()
        optimizer, rows = kind(groups, lr=0.1), []
        x = torch.randn(16, 6)

        def closure(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = model(x).pow(4).mean()
            loss.backward()
            return loss

        with so.track(optimizer, rows.append):
            optimizer.step(closure)  # no gradient there before
        entry, weight = rows[0]["parameters"]["0.weight"], model[0].weight
        assert set(rows[0]["parameters"]) == {"0.weight", "3.weight + 3.bias"}
        assert entry["scaled_grad_norm"]["mean"] > 0
        assert weight.grad is not None


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_are_logged_as_eager_ones(kind):
    logs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, groups = model_and_groups()
        optimizer, rows = kind(groups, lr=0.1), []
        make_step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        with so.track(optimizer, rows.append, every=2):
            for _ in range(4):
                optimizer.zero_grad()
                model(torch.randn(16, 6)).pow(4).mean().backward()
                make_step()
        logs.append(rows)
    torch.compiler.reset()
    assert [row["step"] for row in logs[0]] == [2, 4]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_logged_under_its_own_names(kind):
    model, groups = model_and_groups()
    compiled = torch.compile(model, backend="eager")
    optimizer, rows = kind(groups, lr=0.1), []
    with so.track(optimizer, rows.append):
        train_step(compiled, optimizer)
    assert set(rows[0]["parameters"]) == {"0.weight", "3.weight + 3.bias"}
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["ours", "torch", "fsdp2"])
def test_two_ranks_write_one_log_of_whole_tensors(kind, tmp_path):
    """DDP, ours and torch's, and FSDP2, against one process that sees all of the data."""
    script = Path(monitor_ranks.__file__)
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", script, kind, str(rank), tmp_path])
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    net = monitor_ranks.model()
    groups = so.param_groups(net, monitor_ranks.SPHERES)
    make = so.SphereAdam if kind == "ours" else torch.optim.AdamW
    optimizer, rows = make(groups, lr=0.01), []
    with so.track(optimizer, rows.append, every=2, window=2) as tracker:
        monitor_ranks.train(net, optimizer, tracker)
    got = so.monitor.read_jsonl(tmp_path / "run.jsonl")
    assert [row["step"] for row in got] == [2, 4, 6]
    for alone, together in zip(rows, got, strict=True):
        assert set(alone["parameters"]) == set(monitor_ranks.SPHERES) == set(together["parameters"])
        for name, entry in alone["parameters"].items():
            for probe, table in entry.items():
                if isinstance(table, dict):
                    table = pytest.approx(table, rel=1e-9, abs=1e-15)
                assert together["parameters"][name][probe] == table, probe


def test_composers_monitor_gets_the_numbers_of_the_last_step():
    """As its OptimizerMonitor calls it: after the step, for every parameter with a gradient."""
    model, groups = model_and_groups()
    optimizer, rows = so.SphereAdam(groups, lr=0.1), []
    with so.track(optimizer, rows.append):
        for _ in range(3):
            train_step(model, optimizer)
            metrics = {}
            for name, p in model.named_parameters():
                if p.grad is not None:
                    metrics = optimizer.report_per_parameter_metrics(p, name, metrics)
    entry = rows[-1]["parameters"]["0.weight"]
    for probe in ("angle", "norm", "grad_radial_share"):
        assert float(metrics[f"sphereopt/{probe}/0.weight"]) == pytest.approx(entry[probe]["mean"])
    joint = rows[-1]["parameters"]["3.weight + 3.bias"]["angle"]["mean"]
    assert float(metrics["sphereopt/angle/3.bias"]) == pytest.approx(joint)
    assert not any("1.weight" in key for key in metrics)  # BatchNorm's gain is on no sphere
    twin = copy.deepcopy(optimizer)
    assert twin.listeners == ()


def test_nothing_is_logged_of_what_has_no_weights():
    w = nn.Parameter(torch.zeros(0, 3))
    v = nn.Parameter(torch.randn(2, 3))
    optimizer, rows = so.SphereSGD([("w", w), ("v", v)], lr=0.1, sphere="row"), []
    with so.track(optimizer, rows.append, window=1):
        for _ in range(2):
            w.grad, v.grad = torch.zeros(0, 3), torch.randn(2, 3)
            optimizer.step()
    assert list(rows[1]["parameters"]) == ["v"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_numbers_are_logged_as_such(kind):
    w = nn.Parameter(torch.randn(2, 3))
    optimizer, rows = kind([{"params": [("w", w)], "sphere": "row"}], lr=0.1), []
    with so.track(optimizer, rows.append):
        w.grad = torch.full((2, 3), float("nan"))
        optimizer.step()
    norm = rows[0]["parameters"]["w"]["angle"]["mean"]
    assert norm != norm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_narrow_and_complex_weights_are_logged(kind, dtype):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 64).to(dtype))
    optimizer, rows = kind([{"params": [("w", w)], "sphere": "row"}], lr=0.5), []
    with warnings.catch_warnings(), so.track(optimizer, rows.append, window=1):
        warnings.simplefilter("ignore")
        for _ in range(2):
            w.grad = torch.randn(4, 64).to(dtype)
            old = w.detach().clone()
            optimizer.step()
    x, y = (torch.view_as_real(t).flatten(1) if t.is_complex() else t for t in (old, w.detach()))
    want = so.geometry.angle(x.double(), y.double(), "row").mean().item()
    entry = rows[-1]["parameters"]["w"]
    # Ours says what the step was, before the new weights are rounded to eight bits.
    assert entry["angle"]["mean"] == pytest.approx(want, rel=1e-2)
    assert "diffusive_angle" in entry


@pytest.mark.parametrize("kind", KINDS)
def test_a_logged_step_reads_the_device_once(kind, monkeypatch):
    """On a GPU each reading of a value by Python is a wait."""
    model, groups = model_and_groups()
    optimizer, rows, lists = kind(groups, lr=0.1), [], []
    tolist = torch.Tensor.tolist
    train_step(model, optimizer)  # the first one of all looks for weights that are zero
    with so.track(optimizer, rows.append, window=2, every={0: 1, 2: 2}) as tracker:
        for i in range(1, 5):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 6)).pow(4).mean()
            loss.backward()
            tracker.log(loss=loss)
            sources = [*model.parameters(), loss, *(p.grad for p in model.parameters())]
            with (
                Readings([x for x in sources if x is not None]) as readings,
                monkeypatch.context() as m,
            ):
                m.setattr(torch.Tensor, "tolist", lambda x, i=i: lists.append(i) or tolist(x))
                m.setattr(torch.Tensor, "numpy", None)
                optimizer.step()
            assert readings.count == 0
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert lists == [1, 2, 4]
