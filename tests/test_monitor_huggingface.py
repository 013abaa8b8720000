"""trainer_kwargs and NormMonitor in runs of a real transformers Trainer, on models made here."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.utils import DistributedType

import sphereopt as so
from sphereopt.hf import trainer_kwargs
from sphereopt.monitor.huggingface import NormMonitor

VOCABULARY, LENGTH = 32, 8


def qwen3():
    """Return a model with per-head norms of queries and keys, whose heads are spheres."""
    torch.manual_seed(1)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        attention_dropout=0.1,
    )
    return transformers.Qwen3ForCausalLM(config)


def bert():
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
    )
    return transformers.BertForMaskedLM(config)


def tokens(count=48):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    return [{"input_ids": x, "labels": x} for x in ids]


def batch():
    rows = tokens(4)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("stop")


def trainer_of(folder, model, kwargs, *callbacks, train=tokens, **options):
    args = transformers.TrainingArguments(
        folder,
        **{
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    return transformers.Trainer(
        **(
            {"model_init": model}
            if callable(model) and not hasattr(model, "parameters")
            else {"model": model}
        ),
        args=args,
        train_dataset=train(),
        eval_dataset=tokens(4),
        callbacks=list(callbacks),
        **kwargs,
    )


SETTINGS = {
    "SphereAdam": (qwen3, {"lr": 0.01, "weight_decay": 0.1}),
    "SphereSGD": (qwen3, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "radius": "free"}),
    "AdamW": (qwen3, {"lr": 0.01, "weight_decay": 0.1}),
    "SphereMuon": (bert, {"lr": 0.01}),
}


def kwargs_of(name, model):
    _, options = SETTINGS[name]
    cls = getattr(so, name, None) or getattr(torch.optim, name)
    if name == "SphereMuon":  # no weight of BERT is scale-invariant: constrained by choice
        groups = so.param_groups(model, {}, constrain="*.dense.weight", constrain_sphere="row")
        return trainer_kwargs(model, optimizer=cls, groups=groups, **options)
    return trainer_kwargs(model, batch(), optimizer=cls, **options)


def assert_equal_runs(a, b):
    for (name, x), y in zip(
        a.model.state_dict().items(), b.model.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), name
    states = [t.optimizer.state_dict()["state"] for t in (a, b)]
    assert states[0].keys() == states[1].keys() != set()
    for key, values in states[0].items():
        for name, x in values.items():
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(states[1][key][name])), name


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_crashed_and_went_on_equals_one_that_did_not(name, tmp_path):
    make, _ = SETTINGS[name]

    def run(log, *callbacks, resume=None):
        model = make()
        monitor = NormMonitor(tmp_path / log, window=0)
        trainer = trainer_of(
            tmp_path,
            model,
            kwargs_of(name, model),
            monitor,
            *callbacks,
            save_strategy="steps",
            save_steps=4,
            warmup_steps=3,
        )
        with monitor:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole.jsonl")
    with pytest.raises(RuntimeError, match="stop"):
        run("parts.jsonl", StopAt(7))
    assert [r["step"] for r in so.monitor.read_jsonl(tmp_path / "parts.jsonl")] == [*range(1, 8)]
    resumed = run("parts.jsonl", resume=str(tmp_path / "checkpoint-4"))

    assert_equal_runs(whole, resumed)
    rows, expected = (so.monitor.read_jsonl(tmp_path / f"{x}.jsonl") for x in ("parts", "whole"))
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert expected[4].pop("metrics")["loss"] > 0  # logged at step 4: the resumed run has it not
    assert rows == expected
    lines = (json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines())
    assert [line["run"]["start"] for line in lines if "run" in line] == [0, 4]


def spheres_of(optimizer):
    return [group["sphere"] for group in optimizer.param_groups if group["sphere"] is not None]


def test_one_result_serves_any_number_of_trainers(tmp_path):
    model = qwen3()
    kwargs = kwargs_of("SphereAdam", model)
    for _ in range(2):
        trainer = trainer_of(tmp_path, model, kwargs, max_steps=1)
        first = trainer.create_optimizer()
        trainer.optimizer = None
        second = trainer.create_optimizer()
        assert first is not second
        assert spheres_of(first) == spheres_of(second) == ["tensor", "block:2"]
        trainer.train()


def test_models_made_by_the_trainer_are_trained_on_their_spheres(tmp_path):
    rows = []
    kwargs = kwargs_of("SphereAdam", qwen3())
    trainer = trainer_of(tmp_path, qwen3, kwargs, NormMonitor(rows.append), max_steps=2)
    trainer.train()
    trainer.train()  # of a second new model
    assert [row["step"] for row in rows] == [1, 2, 1, 2]
    joint, *heads = rows[0]["parameters"]
    assert joint.startswith("model.embed_tokens.weight + model.layers.0.self_attn.o_proj.weight")
    assert heads == [f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qk"]
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.model.parameters()}


def test_the_schedule_moves_the_lr_that_was_given_to_us(tmp_path):
    rows = []
    model = qwen3()
    kwargs = trainer_kwargs(model, batch(), lr=0.02)
    trainer = trainer_of(
        tmp_path, model, kwargs, NormMonitor(rows.append), learning_rate=1.0, max_steps=4
    )
    trainer.train()
    for row, share in zip(rows, (1, 0.75, 0.5, 0.25), strict=True):
        for entry in row["parameters"].values():
            assert entry["lr"] == pytest.approx(0.02 * share)
            # lr is the angle; float32 weights know it to about 1e-7 of a radian
            assert entry["angle"]["max"] == pytest.approx(0.02 * share, rel=1e-4)


@pytest.mark.parametrize(
    ("cls", "options", "on_spheres"),
    [
        (so.SphereAdam, {}, 0.0),
        (so.SphereAdam, {"radius": "free"}, 0.1),
        (torch.optim.AdamW, {}, 0.1),
    ],
    ids=["fixed", "free", "torch"],
)
def test_weight_decay_goes_where_it_has_a_meaning(cls, options, on_spheres):
    model = qwen3()
    result = trainer_kwargs(model, batch(), optimizer=cls, lr=0.01, weight_decay=0.1, **options)
    factory, options = result["optimizer_cls_and_kwargs"]
    for group in factory()(model, **options).param_groups:
        for p in group["params"]:
            expected = on_spheres if group["sphere"] else 0.1 if p.ndim > 1 else 0.0
            assert group["weight_decay"] == expected


def test_accumulated_batches_make_one_step(tmp_path):
    rows = []
    model = qwen3()
    kwargs, monitor = kwargs_of("SphereAdam", model), NormMonitor(rows.append, every={0: 1, 2: 2})
    options = {"gradient_accumulation_steps": 3, "max_steps": 6}
    trainer_of(tmp_path, model, kwargs, monitor, **options).train()
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert [list(row.get("metrics", ())) for row in rows] == [
        [],
        [],
        *[["loss", "grad_norm", "learning_rate", "epoch"]] * 2,
    ]


def test_evaluation_is_not_training(tmp_path):
    rows = []
    model = qwen3()
    kwargs = kwargs_of("SphereAdam", model)
    monitor = NormMonitor(rows.append)
    trainer = trainer_of(
        tmp_path, model, kwargs, monitor, max_steps=4, eval_strategy="steps", eval_steps=2
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[2]["metrics"]["eval_loss"] > 0
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_steps_that_a_loss_scaler_skips_are_counted_as_the_trainer_counts_them():
    w = torch.nn.Parameter(torch.randn(2, 3))
    optimizer, rows = so.SphereAdam([("w", w)], lr=0.1, sphere="row"), []
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    with NormMonitor(rows.append) as monitor:
        monitor.on_train_begin(None, state, None, optimizer=optimizer)
        for skipped in (False, True, False):
            monitor.on_pre_optimizer_step(None, state, None)
            w.grad = torch.randn(2, 3)
            if not skipped:
                optimizer.step()
            state.global_step += 1
    assert [row["step"] for row in rows] == [1, 3]


def test_other_processes_write_nothing(tmp_path):
    optimizer = so.SphereAdam(qwen3().parameters(), lr=0.1, sphere="tensor")
    state = SimpleNamespace(global_step=0, is_world_process_zero=False)
    with NormMonitor(tmp_path / "run.jsonl") as monitor:
        monitor.on_train_begin(None, state, None, optimizer=optimizer)
    assert not (tmp_path / "run.jsonl").exists()


def test_an_exception_leaves_nothing_open_in_a_with_block(tmp_path):
    model = qwen3()
    monitor = NormMonitor(tmp_path / "run.jsonl")
    trainer = trainer_of(tmp_path, model, kwargs_of("AdamW", model), monitor, StopAt(2))
    with monitor, pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines] == [None, 1, 2]


def test_training_again_after_an_exception_logs_each_step_once(tmp_path):
    rows, stop = [], StopAt(2)
    model = qwen3()
    kwargs, monitor = kwargs_of("SphereAdam", model), NormMonitor(rows.append)
    trainer = trainer_of(tmp_path, model, kwargs, monitor, stop, max_steps=3)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train()
    assert [row["step"] for row in rows] == [1, 2, 1, 2, 3]


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    model = qwen3()
    with pytest.raises(TypeError, match=r"lr is missing: .*TrainingArguments.learning_rate"):
        trainer_kwargs(model, batch())
    with pytest.raises(TypeError, match="give one of example_inputs, report and groups"):
        trainer_kwargs(model, lr=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        NormMonitor("run.jsonl", evry=2)
    with pytest.raises(ValueError, match=r"shape \(3,\) that is no parameter of the model"):
        trainer_kwargs(model, lr=0.1, groups=[{"params": [torch.ones(3)]}])
    for p in model.parameters():
        p.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    kwargs = trainer_kwargs(model, report={}, lr=0.1)
    factory, options = kwargs["optimizer_cls_and_kwargs"]
    with pytest.raises(ValueError, match=r"none of the groups: model.embed_tokens.weight, model"):
        factory()(qwen3(), **options)
    with pytest.raises(ValueError, match="the trainer's model has no parameter 'lm_head"):
        factory()(bert(), **options)
    with pytest.raises(RuntimeError, match=r'pip install --upgrade "sphereopt\[hf\]"'):
        factory([{"params": []}], **options)  # transformers before 5.2
    state = SimpleNamespace(
        is_initialized=lambda: True,
        AcceleratorState=lambda: SimpleNamespace(distributed_type=DistributedType.FSDP),
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "accelerate.state", state)
        with pytest.raises(RuntimeError, match=r"FSDP cuts parameters into shards.*DDP"):
            factory()(model, **options)
    plain = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 0.1})}
    with pytest.raises(ValueError, match="no parameter group has a sphere"):
        trainer_of(tmp_path, qwen3(), plain, NormMonitor(print)).train()
