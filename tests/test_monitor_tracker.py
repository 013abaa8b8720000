"""The tracker where training is not a plain loop: schedules, filters, compile, scalers, ranks."""

import pytest
import torch
from small_model import model_and_groups, train_step

import sphereopt as so
from sphereopt.monitor import PROBES
from sphereopt.monitor.schedule import Schedule
from sphereopt.moves import Gram
from sphereopt.optim._reading import Pull, with_decay
from sphereopt.radius import Travel

KINDS = [so.SphereSGD, torch.optim.SGD]


@pytest.mark.parametrize("kind", KINDS)
def test_logs_are_dense_early_and_sparse_later(kind):
    model, groups = model_and_groups()
    optimizer, rows = kind(groups, lr=0.1), []
    with so.track(optimizer, rows.append, every={0: 1, 3: 2, 10: 5}):
        for _ in range(21):
            train_step(model, optimizer)
    assert [row["step"] for row in rows] == [1, 2, 4, 6, 8, 10, 15, 20]


@pytest.mark.parametrize(
    "every", [0, -1, 1.5, {1: 1}, {0: 1, 5: 0}, {0: 1, -3: 2}, {0: 1, 2.5: 3}, {}]
)
def test_schedules_that_mean_nothing_are_refused(every):
    with pytest.raises(ValueError, match="every="):
        Schedule(every)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("names", "skip", "left"),
    [
        ("0.weight", None, {"0.weight"}),
        (["3.*"], None, {"3.weight + 3.bias"}),
        (None, "*bias", {"0.weight"}),
        (lambda name: "+" in name, None, {"3.weight + 3.bias"}),
    ],
)
def test_parameters_are_chosen_by_name(kind, names, skip, left):
    model, groups = model_and_groups()
    optimizer, rows = kind(groups, lr=0.1), []
    with so.track(optimizer, rows.append, names=names, skip=skip, window=1):
        train_step(model, optimizer)
        train_step(model, optimizer)
    assert [set(row["parameters"]) for row in rows] == [left, left]
    assert all("diffusive_angle" in entry for entry in rows[1]["parameters"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_leave_nothing_are_refused_with_what_there_is(kind):
    _, groups = model_and_groups()
    optimizer = kind(groups, lr=0.1)
    with pytest.raises(ValueError, match=r"names='0\.weigth', .* did you mean '0\.weight'\?"):
        so.track(optimizer, [].append, names="0.weigth")
    with pytest.raises(ValueError, match=r"skip='\*' leave nothing to log; there are 0\.weight, 3"):
        so.track(optimizer, [].append, skip="*")


def test_copies_are_made_of_what_is_logged_only(monkeypatch):
    model, groups = model_and_groups()
    copied, clone = [], torch.Tensor.clone
    optimizer = torch.optim.SGD(groups, lr=0.1)

    def counting(self, **options):
        copied.append(self.numel())
        return clone(self, **options)

    with so.track(optimizer, [].append, every=3, names="0.weight", window=0):
        for i in range(1, 4):
            monkeypatch.setattr(torch.Tensor, "clone", counting)
            train_step(model, optimizer)
            monkeypatch.undo()
            assert (48 in copied) == (i == 3)
    assert copied.count(48) == 1


def test_probes_can_be_added_and_left_out():
    model, groups = model_and_groups()
    optimizer, rows = so.SphereSGD(groups, lr=0.1), []

    def doubled(reading):
        return 2 * reading.travel.norm

    with so.track(optimizer, rows.append, probes={"norm": PROBES["norm"], "doubled": doubled}):
        train_step(model, optimizer)
    entry = rows[0]["parameters"]["0.weight"]
    assert set(entry) == {"sphere", "kind", "lr", "weight_decay", "count", "norm", "doubled"}
    assert entry["doubled"]["max"] == pytest.approx(2 * entry["norm"]["max"])


def test_a_probe_of_the_wrong_shape_is_named():
    model, groups = model_and_groups()
    optimizer = so.SphereSGD(groups, lr=0.1)
    with (
        so.track(optimizer, [].append, probes={"odd": lambda reading: torch.zeros(3)}),
        pytest.raises(ValueError, match=r"probe 'odd' returned shape \(3,\), not one value per"),
    ):
        train_step(model, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_two_trackers_on_one_optimizer_do_not_disturb_each_other(kind):
    model, groups = model_and_groups()
    optimizer, dense, sparse = kind(groups, lr=0.1), [], []
    with so.track(optimizer, dense.append), so.track(optimizer, sparse.append, every=2):
        for _ in range(4):
            train_step(model, optimizer)
    assert [row["step"] for row in dense] == [1, 2, 3, 4]
    assert sparse == [dense[1], dense[3]]


def test_a_step_that_raises_leaves_no_listener_behind():
    model, groups = model_and_groups()
    optimizer, rows = so.SphereSGD(groups, lr=0.1), []
    with so.track(optimizer, rows.append):
        train_step(model, optimizer)
        weight = model[0].weight
        weight.grad = torch.randn_like(weight).to_sparse()
        with pytest.raises(so.optim.SphereError):
            optimizer.step()
        weight.grad = None
        train_step(model, optimizer)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["parameters"]["0.weight"]["count"] == 8
    assert optimizer.listeners == ()


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_ride_in_the_next_row(kind):
    model, groups = model_and_groups()
    optimizer, rows = kind(groups, lr=0.1), []
    with so.track(optimizer, rows.append, every=2) as tracker:
        for i in range(4):
            tracker.log(loss=torch.tensor(float(i), requires_grad=True))
            if i == 0:
                tracker.log(accuracy=0.5)
            train_step(model, optimizer)
        with pytest.raises(ValueError, match=r"loss has shape \(2,\); log one number"):
            tracker.log(loss=torch.zeros(2))
    assert [row["metrics"] for row in rows] == [{"loss": 1.0, "accuracy": 0.5}, {"loss": 3.0}]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tracker_counts_on_from_its_own_checkpoint(kind):
    model, groups = model_and_groups()
    optimizer, rows = kind(groups, lr=0.1), []
    with so.track(optimizer, rows.append, every=2) as tracker:
        for _ in range(3):
            train_step(model, optimizer)
        state = tracker.state_dict()
    with so.track(optimizer, rows.append, every=2) as tracker:
        tracker.load_state_dict(state)
        for _ in range(3):
            train_step(model, optimizer)
    assert [row["step"] for row in rows] == [2, 4, 6]


def test_a_config_that_no_file_can_hold_is_refused_before_training(tmp_path):
    _, groups = model_and_groups()
    optimizer = so.SphereSGD(groups, lr=0.1)
    with pytest.raises(TypeError, match=r"config=.* must be what JSON can hold \(Obj"):
        so.track(optimizer, tmp_path / "run.jsonl", config={"layers": {1, 2}})
    assert not optimizer._optimizer_step_pre_hooks
    assert not list(tmp_path.iterdir())


def test_the_header_says_what_was_run():
    _, groups = model_and_groups()

    class Sink:
        def start(self, run):
            self.run = run

        def __call__(self, row):
            pass

    sink = Sink()
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95))
    with so.track(optimizer, sink, every={0: 1, 9: 3}, config={"seed": 3}):
        pass
    run = sink.run
    assert (run["optimizer"], run["rule"], run["format"]) == ("AdamW", "adamw", 1)
    assert run["every"] == {"0": 1, "9": 3}
    assert run["config"] == {"seed": 3}
    first = run["groups"][0]
    assert first["names"] == ["0.weight"]
    assert (first["sphere"], first["betas"], first["lr"]) == ("row", [0.9, 0.95], 0.1)
    assert all(group["sphere"] is None for group in run["groups"][2:])
    assert run["versions"]["torch"] == torch.__version__


def test_numbers_with_decay_are_those_of_the_whole_step():
    """Generic gradients: on scale-invariant ones the gradient's share along weights is nothing."""
    torch.manual_seed(0)
    w, u, g = torch.randn(3, 5, 7, dtype=torch.float64)
    lr, decay = 0.3, 0.7
    seen = (1 - lr * decay) * w
    gram = Gram((seen * seen).sum(1), (seen * u).sum(1), (u * u).sum(1))
    one = torch.ones(5, dtype=torch.float64)
    stored = 2 * w  # of the same direction as the believed weights
    pull = Pull((stored * g).sum(1), (g * g).sum(1), (u * g).sum(1), (stored * stored).sum(1))
    trip, pull = with_decay(Travel(gram, one, -lr * one, one, one), pull, lr, decay)
    whole = u + decay * w
    want = Gram((w * w).sum(1), (w * whole).sum(1), (whole * whole).sum(1))
    for got, expected in zip((*trip.gram, pull.ug), (*want, (whole * g).sum(1)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    moved = trip.a[:, None] * w + trip.b[:, None] * whole
    torch.testing.assert_close(moved, seen - lr * u)
