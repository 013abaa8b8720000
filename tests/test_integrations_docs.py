"""The code of the integrations page runs, block after block, and logs what the page says."""

import argparse
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import sphereopt as so
from sphereopt.cli_doctor import add_command

PAGE = (Path(__file__).parent.parent / "docs/integrations.md").read_text()
BLOCKS = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    for section in PAGE.split("\n## ")[1:]
    if "```python" in section
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    # Lightning's default logger, without TensorBoard.
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    # transformers' loader pins memory, and there may be no accelerator to pin it for.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


def setting():
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
    )
    batches = torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8)

    def train(model, optimizer):
        for batch in batches:
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    report = so.find_spheres(model, torch.randn(8, 4))
    optimizer = so.SphereAdam(so.param_groups(model, report), lr=3e-3)
    names = {"model": model, "batches": batches, "train": train, "report": report}
    return {"so": so, "torch": torch, "opt": optimizer, **names, **language()}


def language():
    config = transformers.Qwen3Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    ids = torch.randint(16, (8, 6))
    return {
        "language_model": transformers.Qwen3ForCausalLM(config),
        "dataset": [{"input_ids": x, "labels": x} for x in ids],
        "batch": {"input_ids": ids, "labels": ids},
    }


def run(section, tmp_path, monkeypatch, **more):
    monkeypatch.chdir(tmp_path)
    (code,) = BLOCKS[section]
    names = {**setting(), **more}
    exec(code, names)
    return names


def steps(name):
    return [row["step"] for row in so.monitor.read_jsonl(name)]


def test_every_block_of_the_page_is_run_by_a_test_here():
    assert list(BLOCKS) == [
        "A loop of your own, with checkpoints",
        "Lightning",
        "transformers",
        "Composer",
        "DistributedDataParallel",
        "GradScaler",
        "torch.compile",
    ]
    assert {len(blocks) for blocks in BLOCKS.values()} == {1}


def test_a_loop_of_your_own(tmp_path, monkeypatch):
    run("A loop of your own, with checkpoints", tmp_path, monkeypatch)
    assert steps("run.jsonl") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert so.monitor.read_jsonl("run.jsonl")[0]["metrics"]["loss"] > 0


def test_lightning(tmp_path, monkeypatch):
    run("Lightning", tmp_path, monkeypatch)
    assert steps("run.jsonl") == [2, 4, 6, 8]
    assert all(row["metrics"]["loss"] > 0 for row in so.monitor.read_jsonl("run.jsonl"))


def test_transformers(tmp_path, monkeypatch):
    run("transformers", tmp_path, monkeypatch)
    assert steps("run.jsonl") == [1, 2, 3, 4]


def test_composer(tmp_path, monkeypatch):
    names = setting()
    for expected in (0, 1):  # the first call starts the listening
        names["train"](names["model"], names["opt"])
        metrics = run("Composer", tmp_path, monkeypatch, **names)["metrics"]
        assert ("sphereopt/angle/0.weight" in metrics) == expected
    assert metrics["sphereopt/angle/0.weight"].item() == pytest.approx(3e-3, rel=1e-4)
    assert not any("3.weight" in name for name in metrics)  # on no sphere


def test_distributed_data_parallel(tmp_path, monkeypatch):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        run("DistributedDataParallel", tmp_path, monkeypatch)
    finally:
        torch.distributed.destroy_process_group()
    assert steps("ddp.jsonl") == [2, 4]


def test_grad_scaler(tmp_path, monkeypatch):
    run("GradScaler", tmp_path, monkeypatch)
    assert steps("scaled.jsonl") == [1, 2, 3, 4]


def test_a_step_that_the_scaler_skips_is_not_counted():
    names, rows = setting(), []
    scaler = torch.amp.GradScaler("cpu")
    with so.track(names["opt"], rows.append):
        for size in (1.0, float("inf"), 1.0):
            scaler.scale(names["model"](torch.randn(8, 4)).square().mean() * size).backward()
            scaler.step(names["opt"])
            scaler.update()
            names["opt"].zero_grad()
    assert [row["step"] for row in rows] == [1, 2]


def test_doctor(capsys):
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    args = parser.parse_args(["doctor"])
    assert args.run(args) == 0
    out = capsys.readouterr().out.splitlines()
    (shown,) = re.findall(r"```console\n\$ sphereopt doctor\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = [line for line in shown.splitlines() if line != "..."]
    assert len(lines) == 8
    assert [line for line in lines if line not in out] == []


def test_torch_compile(tmp_path, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend="eager"))  # fast
    run("torch.compile", tmp_path, monkeypatch)
    assert steps("compiled.jsonl") == [1, 2, 3, 4]
