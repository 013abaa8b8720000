"""The tracker: its numbers against clones in float64, its file against crashes."""

import json

import pytest
import torch
from optimizers import ROWS
from torch import nn

import sphereopt as so
from sphereopt.geometry import angle, norm
from sphereopt.monitor import JsonlSink, read_jsonl


def setting(dtype=torch.float64):
    model = nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.LayerNorm(4)
    ).to(dtype)
    spheres = {"0.weight": "row", ("3.weight", "3.bias"): "tensor"}
    return model, lambda: so.param_groups(model, spheres, decay_norms_and_biases=True)


def step(model, optimizer, dtype=torch.float64):
    optimizer.zero_grad()
    x = torch.randn(16, 6, dtype=dtype)
    nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
    optimizer.step()


def joined(model):
    return torch.cat([p.detach().flatten() for p in model[3].parameters()])[None]


def check(row, old, new, spec, lr, rtol):
    """Compare a logged entry with weights cloned around the step."""
    theta, r = angle(old, new, spec), norm(new, spec)
    assert row["sphere"] == spec
    assert row["lr"] == pytest.approx(lr)
    assert row["count"] == len(theta)
    for key, q in {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}.items():
        assert row["angle"][key] == pytest.approx(torch.quantile(theta, q).item(), rel=rtol)
        assert row["norm"][key] == pytest.approx(torch.quantile(r, q).item(), rel=rtol)
    assert row["angle"]["mean"] == pytest.approx(theta.mean().item(), rel=rtol)


@pytest.mark.parametrize("radius", ["fixed", "free"])
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("lr", [1e-2, 1e-6])
def test_logged_angles_and_norms_are_those_of_cloned_weights(row, radius, lr):
    model, groups = setting()
    optimizer = row.make(groups(), radius=radius, lr=lr)
    rows = []
    with so.track(optimizer, rows.append):
        for _ in range(4):
            old, old_joint = model[0].weight.detach().clone(), joined(model)
            step(model, optimizer)
            new = model[0].weight.detach()
            entries = rows[-1]["parameters"]
            if radius == "free":
                rho = optimizer.state[model[0].weight]["virtual_radius"]
                new = new / norm(new, "row")[:, None] * rho[:, None]
            # At 1e-6 rad, rounding of the clones is 1e-16/1e-6 of the angle.
            check(entries["0.weight"], old, new, "row", lr, 1e-8)
            if radius == "fixed":
                entry = entries["3.weight + 3.bias"]
                check(entry, old_joint, joined(model), "tensor", lr, 1e-8)
    assert [r["step"] for r in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_other_optimizers_are_read_from_their_weights(make):
    model, groups = setting(torch.float32)
    optimizer = make(groups(), lr=1e-3, weight_decay=0.1)
    rows = []
    with so.track(optimizer, rows.append, every=2):
        for i in range(4):
            old, old_joint = model[0].weight.detach().clone(), joined(model)
            step(model, optimizer, torch.float32)
            if i % 2:
                entries = rows[-1]["parameters"]
                # Rows carry float32 digits where weights are float32.
                args = old.double(), model[0].weight.detach().double()
                check(entries["0.weight"], *args, "row", 1e-3, 2e-7)
                args = old_joint.double(), joined(model).double()
                check(entries["3.weight + 3.bias"], *args, "tensor", 1e-3, 2e-7)
    assert [r["step"] for r in rows] == [2, 4]


def test_free_is_logged_as_the_plain_optimizer_it_reproduces():
    logs = []
    for cls, more in ((torch.optim.SGD, {}), (so.SphereSGD, {"radius": "free"})):
        torch.manual_seed(0)
        model, groups = setting()
        for m in model:
            if hasattr(m, "eps"):
                m.eps = 1e-30
        optimizer = cls(groups(), lr=0.01, momentum=0.9, weight_decay=0.05, **more)
        rows = []
        with so.track(optimizer, rows.append):
            for _ in range(20):
                step(model, optimizer)
        logs.append(rows)
    for plain, free in zip(*logs, strict=True):
        for name, entry in plain["parameters"].items():
            for probe in ("norm", "angle", "effective_lr"):
                for key, value in entry[probe].items():
                    assert free["parameters"][name][probe][key] == pytest.approx(value, rel=1e-7)


def test_probes_have_their_closed_forms():
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = so.SphereSGD([("w", w)], lr=0.5, sphere="row", transport="none")
    rows = []
    with so.track(optimizer, rows.append):
        w.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        w.grad += 2 * torch.tensor([[-4.0, 3.0]], dtype=torch.float64)
        optimizer.step()
    entry = {k: v["mean"] for k, v in rows[0]["parameters"]["w"].items() if isinstance(v, dict)}
    assert entry["angle"] == pytest.approx(torch.atan(torch.tensor(0.5 * 10 / 5)).item())
    assert entry["effective_lr"] == pytest.approx(0.5 / 25)
    assert entry["relative_update"] == pytest.approx(0.5 * 125**0.5 / 5)
    assert entry["radial_share"] == pytest.approx(25 / (5 * 125**0.5))
    assert entry["norm"] == pytest.approx(5)


def test_effective_lr_knows_directions_without_a_scale():
    for cls, expected in ((so.SphereAdam, 0.5 / 5), (so.SphereSGD, 0.5 / 25)):
        w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        optimizer = cls([("w", w)], lr=0.5, sphere="row", move="retract")
        rows = []
        with so.track(optimizer, rows.append):
            w.grad = torch.randn(1, 2)
            optimizer.step()
        assert rows[0]["parameters"]["w"]["effective_lr"]["mean"] == pytest.approx(expected)
    optimizer = so.SphereAdam([("w", w)], lr=0.5, sphere="row")  # rotate: lr is the angle
    with so.track(optimizer, rows.append):
        optimizer.step()
    entry = rows[-1]["parameters"]["w"]
    assert entry["effective_lr"]["mean"] == entry["relative_update"]["mean"] == 0.5


def test_large_tensors_are_logged_once_though_stepped_in_pieces(monkeypatch):
    monkeypatch.setitem(so.optim._batching.LARGE, "cpu", 100)
    w = nn.Parameter(torch.randn(50, 20, dtype=torch.float64))
    optimizer = so.SphereSGD([("w", w)], lr=0.1, sphere="row")
    rows, old = [], w.detach().clone()
    with so.track(optimizer, rows.append):
        w.grad = torch.randn(50, 20, dtype=torch.float64)
        optimizer.step()
    check(rows[0]["parameters"]["w"], old, w.detach(), "row", 0.1, 1e-12)


def test_tracking_changes_no_weight_and_leaves_nothing_behind():
    results = []
    for tracked in (False, True):
        torch.manual_seed(0)
        model, groups = setting()
        optimizer = so.SphereAdam(groups(), lr=0.1)
        tracker = so.track(optimizer, lambda row: None) if tracked else None
        for _ in range(3):
            step(model, optimizer)
        if tracker:
            tracker.close()
            assert not optimizer._optimizer_step_pre_hooks
            assert not optimizer._optimizer_step_post_hooks
            assert not optimizer.listeners
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    model, groups = setting()
    optimizer = so.SphereSGD(groups(), lr=0.1)
    path = tmp_path / "deep" / "run.jsonl"
    tracker = so.track(optimizer, path, every=2)
    for _ in range(5):
        step(model, optimizer)
    assert [row["step"] for row in read_jsonl(path)] == [2, 4]  # not closed: as after a crash
    tracker.close()


def test_a_half_written_last_line_is_dropped_on_read_and_on_append(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}\n{"ste')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    sink = JsonlSink(path)
    sink({"step": 3})
    sink.close()
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n{"step":3}\n'
    # No line at all, longer than one block of the search.
    path.write_bytes(b'{"step":' + b"1" * 200_000)
    JsonlSink(path).close()
    assert path.read_bytes() == b""


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step":1}\nnonsense\n{"step":2}\n')
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2"):
        read_jsonl(path)


def test_what_is_not_a_number_is_null_for_strict_readers(tmp_path):
    sink = JsonlSink(tmp_path / "run.jsonl")
    sink({"a": float("nan"), "b": [float("inf"), 1.0]})
    sink.close()

    def refuse(name):
        raise AssertionError(name)

    line = (tmp_path / "run.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"a": None, "b": [None, 1.0]}


def test_steps_count_on_after_a_resume():
    model, groups = setting()
    optimizer, rows = so.SphereSGD(groups(), lr=0.1), []
    with so.track(optimizer, rows.append, every=5, start=10):
        for _ in range(10):
            step(model, optimizer)
    assert [row["step"] for row in rows] == [15, 20]


def test_bad_arguments_say_what_to_do():
    w = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="every=0 must be 1 or more"):
        so.track(so.SphereSGD([w], sphere="row"), print, every=0)
    with pytest.raises(ValueError, match="no parameter group has a sphere; build them with"):
        so.track(torch.optim.SGD([w]), print)


def test_parameters_without_a_gradient_are_not_logged():
    params = [("a", nn.Parameter(torch.randn(2, 3))), ("b", nn.Parameter(torch.randn(2, 3)))]
    optimizer, rows = so.SphereSGD(params, lr=0.1, sphere="row"), []
    with so.track(optimizer, rows.append):
        params[0][1].grad = torch.randn(2, 3)
        optimizer.step()
    assert list(rows[0]["parameters"]) == ["a"]
