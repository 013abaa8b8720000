"""``sphereopt audit``: what it imports and feeds, what it prints where, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sphereopt import audit, cli_audit
from sphereopt.cli import main
from sphereopt.detect import Evidence, Finding, SphereReport

ROOT = Path(__file__).parent.parent

MODULE = (Path(__file__).parent / "audit_models.py").read_text()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, with a module of models in it that is forgotten afterwards."""
    (tmp_path / "zoo.py").write_text(MODULE)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "mod.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import math\n\nmath.sqrt(-1)\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit('usage: leaves')\n")
    monkeypatch.chdir(tmp_path)
    # The modules lie in a different folder for every test.
    yield tmp_path
    for name in ("zoo", "pkg.mod", "pkg", "broken", "leaves"):
        sys.modules.pop(name, None)


@pytest.fixture
def calls(monkeypatch):
    """What the detector was called with; it answers that all weights are on spheres."""
    seen = []

    def stub(model, args=(), kwargs=None, *, loss=None, output=None, seed=0):
        seen.append((model, args, kwargs, seed))
        evidence = Evidence(1e-16, 1e-12, 1e-5, 1e-9, 3)
        names = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        return SphereReport(
            {n: Finding(n, shape, "tensor", (), "proved", evidence, "stub") for n, shape in names}
        )

    monkeypatch.setattr(cli_audit, "find_spheres", stub)
    return seen


def refused(argv, capsys):
    """Run a command line that must be refused; return its one line."""
    with pytest.raises(SystemExit) as caught:
        main(["audit", *argv])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line != "imported"]
    assert (caught.value.code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("sphereopt audit: error: ")
    return lines[0]


# With the real detector.


def test_table(here, capsys):
    assert main(["audit", "zoo:factory", "--input", "16x4"]) == 0
    out, err = capsys.readouterr()
    assert err == "imported\n"
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:4] == ["parameter", "shape", "sphere", "status"]
    assert rows[1][:3] == ["0.weight", "6x4", "row"]
    assert rows[1][3] in ("proved", "numerical")
    assert ["3.weight", "2x6", "-", "none"] in [row[:4] for row in rows]


def test_json_is_all_there_is_on_stdout_and_comes_back(here, capsys):
    options = ["--input", "16x4", "--factory-kwargs", '{"classes": 5}', "--seed", "3", "--json"]
    assert main(["audit", "pkg.mod:factory", *options]) == 0
    out, err = capsys.readouterr()
    assert err == "imported\n"
    report = SphereReport.from_json(out)
    assert report["0.weight"].sphere == "row"
    assert report["3.weight"].shape == (5, 6)
    assert json.loads(out) == json.loads(report.to_json())
    main(["audit", "pkg.mod:factory", *options])
    assert capsys.readouterr().out == out  # seeded


def test_integer_inputs(here, capsys):
    keywords = '{"ids": "2x5:int64:11", "scale": 0.5, "mode": "=2x2"}'
    assert main(["audit", "zoo:Language", "--kwargs", keywords]) == 0
    out = capsys.readouterr().out
    assert "embed.weight" in out
    assert "head.weight" in out


@pytest.mark.parametrize("options", [["--input", "16x5"], []])
def test_a_model_that_cannot_be_run_is_exit_code_3(options, here, capsys):
    assert main(["audit", "zoo:factory", *options]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line != "imported"]
    assert 1 <= len(lines) <= 2
    assert lines[0].startswith("sphereopt audit: error: ")


def test_as_a_process(here):
    """The current directory is on the path, and torch is all that is loaded."""
    code = (
        "import runpy, sys\n"
        f"sys.path[0] = {str(ROOT)!r}\n"  # as an installed script: not the current directory
        "sys.argv = ['sphereopt', 'audit', 'zoo:factory', '--input', '16x4', '--json']\n"
        "try:\n"
        "    runpy.run_module('sphereopt', run_name='__main__')\n"
        "finally:\n"
        "    wanted = {'matplotlib', 'sklearn', 'rich', 'safetensors', 'transformers'}\n"
        "    print(sorted(wanted & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.split("\n")[:2] == ["imported", "[]"]
    assert SphereReport.from_json(done.stdout)["0.weight"].sphere == "row"
    assert done.returncode == 0


# What the detector is given.


def test_inputs(here, calls, capsys):
    specs = ["2x3", "4x8:bfloat16", "2x200:int64:7", "scalar:float64", "50:uint8:256", "9:bool"]
    options = [part for spec in specs for part in ("--input", spec)]
    keywords = '{"ids": "3x2:int32:5", "flag": false, "size": [2, 2], "how": "mean", "s": "=2x3"}'
    assert main(["audit", "zoo:factory", *options, "--kwargs", keywords, "--seed", "4"]) == 0
    ((_, inputs, kwargs, seed),) = calls
    assert seed == 4
    assert [(x.dtype, tuple(x.shape)) for x in inputs] == [
        (torch.float32, (2, 3)),
        (torch.bfloat16, (4, 8)),
        (torch.int64, (2, 200)),
        (torch.float64, ()),
        (torch.uint8, (50,)),
        (torch.bool, (9,)),
    ]
    assert set(inputs[2].unique().tolist()) == set(range(7))
    ids = kwargs.pop("ids")
    assert (ids.dtype, tuple(ids.shape)) == (torch.int32, (3, 2))
    assert kwargs == {"flag": False, "size": [2, 2], "how": "mean", "s": "2x3"}

    main(["audit", "zoo:factory", *options, "--seed", "4"])
    main(["audit", "zoo:factory", *options, "--seed", "5"])
    again, other = calls[1][1], calls[2][1]
    assert all(torch.equal(x, y) for x, y in zip(inputs, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(inputs[:3], other, strict=False))
    weights = [call[0][0].weight for call in calls]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_floats_are_normal():
    x = audit.random_input(audit.parse_input("100x100"), torch.Generator().manual_seed(0))
    # Standard errors with 10,000 draws: 0.01 and 0.007; these are five of them.
    assert x.mean().item() == pytest.approx(0, abs=0.05)
    assert x.std().item() == pytest.approx(1, abs=0.035)


def test_targets(here, calls):
    path = list(sys.path)
    for target, classes in (("zoo:factory", 2), ("zoo:Spaces.instance", 3), ("pkg.mod:factory", 2)):
        assert main(["audit", target]) == 0
        model, args, kwargs, seed = calls[-1]
        assert model[3].out_features == classes
        assert (args, kwargs, seed) == ((), {}, 0)
    assert main(["audit", "zoo:Language"]) == 0
    assert sys.path == path


def test_interrupt(here, calls, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_audit, "find_spheres", interrupted)
    assert main(["audit", "zoo:factory"]) == 130
    assert capsys.readouterr().err == "imported\nsphereopt audit: interrupted\n"


# Checkpoints.


def weights(model):
    """Return a state dict of ones."""
    return {key: torch.ones_like(value) for key, value in model.state_dict().items()}


def network(classes=2):
    return nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, classes)
    )


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_checkpoint(wrapper, here, calls):
    state = weights(network())
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, "x.pt")
    assert main(["audit", "zoo:factory", "--checkpoint", "x.pt"]) == 0
    assert all(bool((p == 1).all()) for p in calls[0][0].parameters())


def test_safetensors_checkpoint(here, calls):
    safe = pytest.importorskip("safetensors.torch")
    safe.save_file(weights(network()), "x.safetensors")
    assert main(["audit", "zoo:factory", "--checkpoint", "x.safetensors"]) == 0
    assert all(bool((p == 1).all()) for p in calls[0][0].parameters())


def test_the_other_name_of_a_tied_weight_may_be_missing(here, calls):
    state = {"embed.weight": torch.ones(11, 4), "norm.weight": torch.ones(4)}
    torch.save(state | {"norm.bias": torch.ones(4)}, "x.pt")
    assert main(["audit", "zoo:Tied", "--checkpoint", "x.pt"]) == 0
    assert bool((calls[0][0].head.weight == 1).all())


def test_checkpoints_that_do_not_fit(here, calls, capsys):
    option = ["zoo:factory", "--checkpoint"]
    assert "'x.pt': there is no such file" in refused([*option, "x.pt"], capsys)

    state = weights(network())
    changed = {**state, "3.extra": torch.ones(2)}
    del changed["0.weight"], changed["3.bias"]
    torch.save(changed, "x.pt")
    line = refused([*option, "x.pt"], capsys)
    assert "missing 0.weight, 3.bias; unexpected 3.extra" in line

    torch.save(weights(network(5)), "x.pt")
    line = refused([*option, "x.pt"], capsys)
    assert "size mismatch for 3.weight" in line
    assert "[5, 6]" in line

    torch.save([1, 2], "x.pt")
    assert "holds list; save model.state_dict()" in refused([*option, "x.pt"], capsys)
    torch.save(network(), "x.pt")  # a pickled module would run code
    line = refused([*option, "x.pt"], capsys)
    assert "cannot be read" in line
    assert "save model.state_dict(), tensors only" in line
    for name in ("x.pt", "x.safetensors"):
        Path(name).write_text("hello")
        assert "--checkpoint" in refused([*option, name], capsys)


def test_missing_safetensors_is_one_line(here, calls, monkeypatch, capsys):
    Path("x.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    line = refused(["zoo:factory", "--checkpoint", "x.safetensors"], capsys)
    assert "pip install safetensors" in line


# Refusals.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ("TARGET",)),
        (["zoo"], ("TARGET 'zoo'", "MODULE:NAME")),
        (["zoo.py:factory:x"], ("TARGET", "MODULE:NAME")),
        ([":factory"], ("TARGET", "MODULE:NAME")),
        (["nothing.there:x"], ("TARGET 'nothing.there:x'", "cannot import", "ModuleNotFound")),
        (["broken:x"], ("cannot import broken", "ValueError", "broken.py, line 3")),
        (["leaves:x"], ("cannot import leaves", "SystemExit: usage")),
        (["zoo:resnet"], ("there is no resnet in zoo",)),
        (["zoo:number"], ("number cannot be called", "TypeError")),
        (["zoo:text"], ("returned str", "torch.nn.Module")),
        (["zoo:shapeless"], ("cannot be called", "no shape given", "zoo.py, line")),
        (["zoo:factory", "--factory-kwargs", '{"depth": 3}'], ("cannot be called", "'depth'")),
        (["zoo:factory", "--factory-kwargs", "depth=3"], ("--factory-kwargs", "not JSON")),
        (["zoo:factory", "--factory-kwargs", "[1]"], ("--factory-kwargs", "not a JSON object")),
        (["zoo:Spaces.instance", "--factory-kwargs", "{}"], ("drop --factory-kwargs",)),
        (["zoo:factory", "--input", "2,3"], ("--input", "'2,3'", "SHAPE[:DTYPE[:VOCAB]]")),
        (["zoo:factory", "--input", "-2x3"], ("--input",)),
        (["zoo:factory", "--input", ""], ("--input", "''")),
        (["zoo:factory", "--input", "2x0"], ("--input", "1 or more")),
        (["zoo:factory", "--input", "2x3:float8"], ("--input", "'float8'", "bfloat16")),
        (["zoo:factory", "--input", "2x3:"], ("--input", "unknown dtype ''")),
        (["zoo:factory", "--input", "2x3:int64"], ("--input", "needs the vocabulary size")),
        (["zoo:factory", "--input", "2x3:int64:0"], ("--input", "1 to 9223372036854775807")),
        (["zoo:factory", "--input", "2x3:int8:129"], ("--input", "1 to 128")),
        (["zoo:factory", "--input", "2x3:int8:-4"], ("--input", "1 to 128")),
        (["zoo:factory", "--input", "2x3:int8:2:2"], ("--input", "SHAPE[:DTYPE[:VOCAB]]")),
        (["zoo:factory", "--input", "2x3:float32:5"], ("--input", "drop ':5'")),
        (["zoo:factory", "--input", "99999x99999x99999"], ("--input", "cannot be made")),
        (["zoo:factory", "--input", "2x" + "9" * 30], ("--input", "cannot be made")),
        (["zoo:factory", "--kwargs", "{"], ("--kwargs", "not JSON")),
        (["zoo:factory", "--kwargs", "3"], ("--kwargs", "not a JSON object")),
        (["zoo:factory", "--kwargs", '{"a": "2x3:int64"}'], ("--kwargs", "'=2x3:int64'")),
        (["zoo:factory", "--seed", "-1"], ("--seed", "0 to 2**63 - 1")),
        (["zoo:factory", "--seed", "1.5"], ("--seed", "'1.5'")),
        (["zoo:factory", "--inputs", "2x3"], ("unknown arguments --inputs 2x3", "--help")),
    ],
)
def test_bad_options_are_one_line(options, expected, here, calls, capsys):
    line = refused(options, capsys)
    for text in expected:
        assert text in line
    assert not calls


# Exit code 3.


def test_a_weight_that_gets_no_gradient_is_exit_code_3(here, capsys):
    assert main(["audit", "zoo:Detached", "--input", "16x4"]) == 3
    out, err = capsys.readouterr()
    assert "body.0.weight" in out
    assert err.splitlines()[-1].startswith(
        "sphereopt audit: error: not measured: gate (no gradient"
    )


def test_what_could_not_be_measured_is_exit_code_3(here, calls, monkeypatch, capsys):
    measured = Evidence(0.3, None, None, 0.3, 3)
    verdicts = {
        "0.weight": ("none", None, "no gradient could be taken"),
        "1.weight": ("inert", None, "nothing depends on it"),
        "1.bias": ("none", measured, "its norm matters"),
    }

    def stub(model, *args, **kwargs):
        return SphereReport(
            {n: Finding(n, (6,), None, (), s, e, why) for n, (s, e, why) in verdicts.items()}
        )

    monkeypatch.setattr(cli_audit, "find_spheres", stub)
    assert main(["audit", "zoo:factory", "--json"]) == 3
    out, err = capsys.readouterr()
    assert list(SphereReport.from_json(out)) == list(verdicts)  # what is known is printed
    assert err.splitlines()[-1] == (
        "sphereopt audit: error: not measured: 0.weight (no gradient could be taken)"
    )

    # Frozen: nobody trains it, so nothing is missing.
    real = audit.import_model

    def frozen(*args):
        model = real(*args)
        model[0].weight.requires_grad_(False)
        return model

    monkeypatch.setattr(audit, "import_model", frozen)
    assert main(["audit", "zoo:factory"]) == 0


def test_an_error_of_the_detector_says_where(here, monkeypatch, capsys):
    def stub(model, *args, **kwargs):
        model(torch.randn(3))

    (here / "zoo.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        raise RuntimeError('first\\n\\nsecond')\n"
    )
    monkeypatch.setattr(cli_audit, "find_spheres", stub)
    assert main(["audit", "zoo:Net"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    file = str(here / "zoo.py")
    assert err == f"sphereopt audit: error: RuntimeError: first second, in {file}, line 6\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["audit", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--input", "--kwargs", "--factory-kwargs", "--checkpoint", "--seed", "--json"):
        assert option in text
    assert "exit codes:" in text
    assert "2x16:int64:50257" in text
    assert max(map(len, text.splitlines())) <= 100
