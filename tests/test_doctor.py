"""``sphereopt doctor``: it says what works, and notices what does not."""

import argparse
import importlib.metadata
import json
import subprocess
import tomllib
import warnings
from pathlib import Path

import pytest
import torch

import sphereopt as so
from sphereopt import doctor
from sphereopt.cli_doctor import add_command
from sphereopt.doctor import EXTRAS, Check, examine


def found(name, **options):
    (check,) = (check for check in examine(**options) if check.name == name)
    return check


def command(*arguments):
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    args = parser.parse_args(["doctor", *arguments])
    return args.run(args)


def test_everything_works_here_and_is_called_what_it_is():
    checks = {check.name: check for check in examine()}
    assert [check for check in checks.values() if check.core and check.status != "ok"] == []
    assert checks["torch"].text == importlib.metadata.version("torch")
    assert checks["sphereopt"].text == so.__version__
    assert checks["cuda"].status == ("ok" if torch.cuda.is_available() else "absent")
    for name in ("plain", "foreach", "fused", "bfloat16", "distributed"):
        assert checks[name].status == "ok", checks[name]


def test_looking_changes_nothing():
    filters, random = list(warnings.filters), torch.get_rng_state()
    threads = torch.get_num_threads()
    examine()
    assert warnings.filters == filters
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert not torch.distributed.is_initialized()


def test_a_process_group_that_is_there_is_left_alone():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert found("distributed").text == "gloo, 1 processes"
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


class Drifting(so.SphereSGD):
    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 1 + 1e-13)


class Standing(so.SphereSGD):
    def step(self, closure=None):
        return None


class Broken(so.SphereSGD):
    def step(self, closure=None):
        raise RuntimeError("no kernel\nfor this device")


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Drifting, "ArithmeticError: the norm of a sphere changed by"),
        (Standing, "ArithmeticError: a sphere turned by 0.0e+00 radians"),
        (Broken, "RuntimeError: no kernel"),
    ],
)
def test_an_optimizer_that_does_not_work_is_found_out(cls, text, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_OPTIMIZERS", (so.SphereSGD, cls))
    assert command() == 1
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith(f"  {cls.__name__}"))
    assert "FAILED" in line
    assert text in line
    assert out.endswith(f"does not work here: {cls.__name__} failed.\n")


def test_a_wrong_angle_is_found_out(monkeypatch):
    monkeypatch.setattr(doctor.math, "atan2", lambda y, x: 2 * (y / x))
    assert found("angle").fatal


def test_a_missing_extra_is_no_failure_and_says_how_to_get_it(monkeypatch, capsys):
    without(monkeypatch, "lightning", "accelerate")
    assert found("lightning").text == 'not installed: pip install "sphereopt[lightning]"'
    assert found("accelerate").text == 'not installed: pip install "sphereopt[hf]"'
    assert command() == 0
    assert capsys.readouterr().out.endswith("\nTraining on spheres works here.\n")


def without(monkeypatch, *names, version=None):
    """Make distributions look missing, or of another version."""
    real = importlib.metadata.version

    def fake(name):
        if name not in names:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake)


def test_a_missing_dependency_is_fatal(monkeypatch):
    without(monkeypatch, "numpy")
    assert found("numpy").fatal
    assert 'pip install "numpy"' in found("numpy").text


@pytest.mark.parametrize(
    ("name", "old", "new"), [("transformers", "5.1.0", "5.2.0rc1"), ("torch", "2.9.1+cu128", "3.0")]
)
def test_a_version_that_clashes_is_named_with_one_that_does_not(
    name, old, new, monkeypatch, capsys
):
    without(monkeypatch, name, version=old)
    check = found(name)
    assert (check.status, check.fatal) == ("failed", False)
    assert check.text.startswith(f"{old} clashes: ")
    assert f'pip install "{name}>=' in check.text
    assert command() == 0
    assert capsys.readouterr().out.endswith(f"works here. What failed: {name}.\n")
    monkeypatch.undo()
    without(monkeypatch, name, version=new)
    assert found(name).status == "ok"


def test_a_compiler_that_hangs_or_crashes_stops_nothing(monkeypatch):
    monkeypatch.setattr(doctor, "_PATIENCE", 0.01)
    check = found("compile", full=True)
    assert (check.status, check.fatal) == ("failed", False)
    assert "timed out after 0.01 seconds" in check.text
    crash = subprocess.CompletedProcess([], -11, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: crash)
    assert found("compile", full=True).text == "RuntimeError: exit code -11: no message"


def test_compiling_is_tried_on_request():
    assert found("compile").status == "absent"
    assert "sphereopt doctor --full" in found("compile").text
    assert doctor._apart() == "two compiled steps made"


def test_the_table_is_plain_and_aligned(capsys):
    assert command() == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isascii() and line == line.rstrip() for line in lines)
    rows = [line for line in lines if line.startswith("  ")]
    checks = examine()
    assert len(rows) == len(checks)
    column = {line.index(check.text) for line, check in zip(rows, checks, strict=True)}
    assert len(column) == 1
    assert [line for line in lines[:-1] if line and line not in rows] == [
        "versions",
        "devices",
        "steps",
        "extras",
        "arithmetic",
    ]


def test_json_says_the_same(capsys):
    assert command("--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["works"] is True
    assert [Check(**check) for check in answer["checks"]] == examine()


def test_the_extras_are_those_of_the_package():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        wanted = [requirement.split(">=")[0] for requirement in extras[extra]]
        assert wanted == list(packages), extra
