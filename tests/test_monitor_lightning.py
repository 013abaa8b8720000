"""NormMonitor in runs of a real Lightning Trainer."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import lightning.pytorch as lightning
import pytest
import pytorch_lightning
import torch
from torch import nn

import sphereopt as so
from sphereopt.monitor.lightning import NormMonitor

BATCHES = 4  # per epoch
pytestmark = [
    # Advice of Lightning about loaders, and what its fit of a tiny run cannot avoid.
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


def loader():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCHES * 8, 6, generator=generator)
    return torch.utils.data.DataLoader(x, batch_size=8)


def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4)
    )


SPECS = {"0.weight": "row", ("3.weight", "3.bias"): "tensor"}
OPTIMIZERS = {
    "SphereAdam": lambda groups: so.SphereAdam(groups, lr=0.02),
    "SphereSGD": lambda groups: so.SphereSGD(
        groups, lr=0.1, momentum=0.9, weight_decay=0.01, radius="free"
    ),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1),
}


def module_of(package, make, *, fail_at=None, error=RuntimeError, skip=()):
    """Return a module whose training raises at a batch, or skips batches."""

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = net(), 0

        def training_step(self, batch, index):
            self.seen += 1
            if self.seen == fail_at:
                raise error("stop")
            if self.seen in skip:
                return None
            loss = self.net(batch).pow(4).mean()
            self.log("loss", loss)
            self.log("epoch loss", loss, on_step=False, on_epoch=True, sync_dist=True)
            return loss

        def validation_step(self, batch, index):
            self.log("val", self.net(batch).pow(4).mean())

        def configure_optimizers(self):
            return make(so.param_groups(self.net, SPECS))

    return Module()


def trainer_of(folder, package=lightning, **options):
    return package.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": -1,
            "default_root_dir": folder,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )


def fit(
    folder, steps, *callbacks, make=OPTIMIZERS["SphereAdam"], package=lightning, ckpt=None, **o
):
    module = module_of(package, make)
    trainer = trainer_of(folder, package, max_steps=steps, callbacks=list(callbacks), **o)
    trainer.fit(module, loader(), ckpt_path=ckpt)
    return trainer, module


def assert_equal_runs(a, b):
    (trainer, module), (other, twin) = a, b
    for (name, x), y in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    states = [t.optimizers[0].state_dict()["state"] for t in (trainer, other)]
    assert states[0].keys() == states[1].keys() != set()
    for key, values in states[0].items():
        for name, x in values.items():
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(states[1][key][name])), name


@pytest.mark.parametrize(
    ("name", "package"),
    [*((name, lightning) for name in OPTIMIZERS), ("SphereAdam", pytorch_lightning)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_run_that_crashed_and_went_on_equals_one_that_did_not(name, package, tmp_path):
    make = OPTIMIZERS[name]
    whole = fit(
        tmp_path,
        12,
        NormMonitor(tmp_path / "whole.jsonl", window=0),
        make=make,
        package=package,
    )
    unseen = fit(tmp_path, 12, make=make, package=package)
    assert_equal_runs(whole, unseen)  # being monitored changes nothing

    log = tmp_path / "parts.jsonl"

    def callbacks():
        saving = package.callbacks.ModelCheckpoint(tmp_path, "at-{step}", every_n_train_steps=8)
        return [NormMonitor(log, window=0), saving]

    options = {"package": package, "max_steps": 12, "enable_checkpointing": True}
    broken = trainer_of(tmp_path, callbacks=callbacks(), **options)
    with pytest.raises(RuntimeError, match="stop"):
        broken.fit(module_of(package, make, fail_at=11), loader())
    assert [row["step"] for row in so.monitor.read_jsonl(log)] == list(range(1, 11))

    trainer, module = (
        trainer_of(tmp_path, callbacks=callbacks(), **options),
        module_of(package, make),
    )
    trainer.fit(module, loader(), ckpt_path=tmp_path / "at-step=8.ckpt")
    resumed = trainer, module
    assert_equal_runs(whole, resumed)
    rows = so.monitor.read_jsonl(log)
    assert [row["step"] for row in rows] == list(range(1, 13))
    expected = so.monitor.read_jsonl(tmp_path / "whole.jsonl")
    assert expected[8]["metrics"].pop("epoch loss") > 0  # Lightning forgets it in a resume
    assert rows == expected


def test_a_checkpoint_without_monitor_tells_the_step_all_the_same(tmp_path):
    trainer, _ = fit(tmp_path, 8)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    rows = []
    fit(tmp_path, 12, NormMonitor(rows.append), ckpt=tmp_path / "old.ckpt")
    assert [row["step"] for row in rows] == [9, 10, 11, 12]


def test_the_loss_of_a_row_is_that_of_its_step(tmp_path):
    losses, rows = [], []

    class Watch(lightning.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            losses.append(loss.item())

    fit(tmp_path, 6, NormMonitor(rows.append, every=2), Watch())
    assert [row["metrics"]["loss"] for row in rows] == losses[1::2]
    assert len(set(losses)) == 6
    mean = sum(losses[:BATCHES]) / BATCHES
    found = [row["metrics"].get("epoch loss") for row in rows]
    assert found == [None, None, pytest.approx(mean, rel=1e-6)]  # of float32 numbers


def test_accumulated_batches_make_one_step(tmp_path):
    rows = []
    trainer, _ = fit(tmp_path, 3, NormMonitor(rows.append), accumulate_grad_batches=2)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert trainer.global_step == 3


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_batch_is_counted_as_lightning_counts_it(tmp_path):
    rows = []
    module = module_of(lightning, OPTIMIZERS["AdamW"], skip=(2, 3))
    trainer = trainer_of(tmp_path, max_steps=5, callbacks=[NormMonitor(rows.append)])
    trainer.fit(module, loader())
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [bool(row["parameters"]) for row in rows] == [True, False, False, True, True]


def test_a_second_fit_of_one_trainer_goes_on(tmp_path):
    rows = []
    trainer, module = fit(tmp_path, 3, NormMonitor(rows.append))
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(module, loader())
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_one_monitor_in_a_new_trainer_starts_anew(tmp_path):
    rows = []
    monitor = NormMonitor(rows.append)
    fit(tmp_path, 2, monitor)
    fit(tmp_path, 2, monitor)
    assert [row["step"] for row in rows] == [1, 2, 1, 2]


class Pair(lightning.LightningModule):
    """Two networks, by hand: the second makes a step on every other batch."""

    def __init__(self, make):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b, self._make = net(), net(), make

    def training_step(self, batch, index):
        for number, part in enumerate((self.a, self.b)):
            optimizer = self.optimizers()[number]
            if number == 0 or index % 2 == 1:
                optimizer.zero_grad()
                loss = part(batch).pow(4).mean()
                self.log("ab"[number], loss)
                self.manual_backward(loss)
                optimizer.step()

    def configure_optimizers(self):
        groups = so.param_groups(
            self,
            {"a.0.weight": "row", "b.0.weight": "row"},
            groups=[{"params": list(part.parameters())} for part in (self.a, self.b)],
        )
        halves = [[g for g in groups if g["params"][0][0].startswith(part)] for part in "ab"]
        return [self._make(half) for half in halves]


@pytest.mark.parametrize("monitored", [True, False])
def test_two_optimizers_count_their_own_steps(monitored, tmp_path):
    # A monitor that is new asks the optimizers' states; one that was there need not, and SGD's
    # would not tell.
    make = (lambda g: torch.optim.SGD(g, lr=0.1)) if monitored else OPTIMIZERS["SphereAdam"]
    monitor = [NormMonitor(tmp_path / "run.jsonl")] if monitored else []
    trainer = trainer_of(tmp_path, max_epochs=1, callbacks=monitor)
    trainer.fit(Pair(make), loader())
    assert trainer.global_step == 6
    trainer.save_checkpoint(tmp_path / "pair.ckpt")
    monitor = NormMonitor(tmp_path / "run.jsonl")
    trainer = trainer_of(tmp_path, max_epochs=2, callbacks=[monitor])
    trainer.fit(Pair(make), loader(), ckpt_path=tmp_path / "pair.ckpt")
    for index, (part, first, last) in enumerate([("a", 5, 8), ("b", 3, 4)]):
        rows = so.monitor.read_jsonl(tmp_path / f"run.{index}.jsonl")
        assert [row["step"] for row in rows] == list(range(1 if monitored else first, last + 1))
        assert {name for row in rows for name in row["parameters"]} == {f"{part}.0.weight"}
        assert all(row["metrics"][part] > 0 for row in rows)


def test_an_optimizer_of_which_nothing_is_logged_is_left_alone(tmp_path):
    rows = []
    monitor = NormMonitor(rows.append, names="b.*")
    trainer = trainer_of(tmp_path, max_epochs=1, callbacks=[monitor])
    trainer.fit(Pair(OPTIMIZERS["SphereAdam"]), loader())
    assert [set(row["parameters"]) for row in rows] == [{"b.0.weight"}] * 2


def test_of_two_processes_one_writes(tmp_path):
    # Both see the same batches, and the mean of two equal gradients is that gradient.
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    fit(tmp_path, 4, NormMonitor(tmp_path / "one.jsonl"))
    fit(tmp_path, 4, NormMonitor(tmp_path / "two.jsonl"), **options)
    one, two = (so.monitor.read_jsonl(tmp_path / f"{x}.jsonl") for x in ("one", "two"))
    assert one == two
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) == 1 + 4  # header and steps


def test_nothing_is_logged_outside_of_training(tmp_path):
    rows = []
    monitor = NormMonitor(rows.append)
    trainer = trainer_of(tmp_path, max_steps=1, callbacks=[monitor], num_sanity_val_steps=2)
    module = module_of(lightning, OPTIMIZERS["AdamW"])
    trainer.validate(module, loader())
    assert rows == []
    trainer.fit(module, loader(), loader())
    assert [row["step"] for row in rows] == [1]
    trainer.validate(module, loader())
    assert len(rows) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_attached_after_an_exception_or_an_interrupt(error, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    trainer = trainer_of(tmp_path, max_steps=4, callbacks=[NormMonitor(tmp_path / "run.jsonl")])
    module = module_of(lightning, OPTIMIZERS["SphereAdam"], fail_at=3, error=error)
    try:
        with pytest.raises((error, SystemExit)):
            trainer.fit(module, loader())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further interrupts
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert len(so.monitor.read_jsonl(tmp_path / "run.jsonl")) == 2


def test_a_trial_run_writes_nothing(tmp_path):
    fit(tmp_path, 4, NormMonitor(tmp_path / "run.jsonl"), fast_dev_run=True)
    assert not (tmp_path / "run.jsonl").exists()


def test_other_processes_write_nothing(tmp_path):
    monitor = NormMonitor(tmp_path / "run.jsonl")
    optimizer = OPTIMIZERS["SphereAdam"](so.param_groups(net(), SPECS))
    other = SimpleNamespace(
        fast_dev_run=False, is_global_zero=False, global_step=0, optimizers=[optimizer], loggers=[]
    )
    monitor.on_train_start(other, None)
    optimizer.step()
    assert monitor.state_dict() == {"steps": {0: 1}}  # counted all the same
    monitor.teardown(other, None, "fit")
    assert not (tmp_path / "run.jsonl").exists()


def test_rows_go_to_the_loggers_of_the_trainer(tmp_path):
    logger = lightning.loggers.CSVLogger(tmp_path)
    fit(tmp_path, 2, NormMonitor(), logger=logger, log_every_n_steps=1)
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "sphereopt/angle/0.weight" in text.splitlines()[0]
    rows = []
    logger = lightning.loggers.CSVLogger(tmp_path)
    fit(tmp_path, 2, NormMonitor(rows.append), logger=logger, log_every_n_steps=1)
    text = (tmp_path / "lightning_logs" / "version_1" / "metrics.csv").read_text()
    assert "sphereopt" not in text
    assert len(rows) == 2
    both = NormMonitor([rows.append, tmp_path / "run.jsonl"], loggers=True)
    fit(tmp_path, 2, both, logger=lightning.loggers.CSVLogger(tmp_path), log_every_n_steps=1)
    text = (tmp_path / "lightning_logs" / "version_2" / "metrics.csv").read_text()
    assert "sphereopt/angle/0.weight" in text.splitlines()[0]
    assert len(rows) == 4
    assert len(so.monitor.read_jsonl(tmp_path / "run.jsonl")) == 2


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        NormMonitor("run.jsonl", evry=2)
    with pytest.raises(ValueError, match="every=0 must be 1 or more"):
        NormMonitor("run.jsonl", every=0)
    with pytest.raises(ValueError, match=r'nowhere to write.*NormMonitor\("run.jsonl"\)'):
        fit(tmp_path, 1, NormMonitor())
    plain = NormMonitor(tmp_path / "run.jsonl")
    with pytest.raises(ValueError, match="no optimizer of this run has a parameter group with a"):
        fit(tmp_path, 1, plain, make=lambda g: torch.optim.SGD([g[0]["params"][0][1]], lr=0.1))


def test_lightning_is_optional():
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "import sphereopt.monitor, sphereopt.hf\n"
        "assert not {'transformers', 'accelerate', 'tensorboard', 'pyarrow'} & set(sys.modules)\n"
        "import sphereopt.monitor.lightning"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "sphereopt[lightning]"' in done.stderr.splitlines()[-1]
