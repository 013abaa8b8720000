"""The pages of the calculator: their code runs, their commands print what is shown.

A command is a line ``$ sphereopt calc ...`` (a backslash continues it) in a ``console`` block; what
follows must be its output, where a line ``...`` stands for any number of lines.
"""

import contextlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import sphereopt as so
from sphereopt.cli import main

ROOT = Path(__file__).parent.parent
THEORY = sorted((ROOT / "docs" / "theory").glob("*.md"))
PAGES = [*THEORY, ROOT / "docs" / "calc.md"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    """Return pairs of a command and the output shown below it."""
    found = []
    for block in blocks(page, "console"):
        parts = re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)
        found += [part.partition("\n") for part in parts[1:]]
    return [(line, shown) for line, _, shown in found if line.startswith("sphereopt calc")]


def matches(shown, printed):
    """Whether the lines shown are those printed, but for what ``...`` stands for."""
    wanted = shown.rstrip().splitlines()
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else re.escape(line.rstrip()) + "\n" for line in wanted
    )
    text = "".join(line.rstrip() + "\n" for line in printed.rstrip().splitlines())
    return re.fullmatch(pattern, text) is not None


def test_the_ellipsis_stands_for_lines_and_only_for_lines():
    assert matches("...", "a\nb\n")
    assert matches("a\n...\nc\n", "a\nb\nb\nc\n")
    assert matches("a\n...\nc\n", "a\nc\n")
    assert matches("a\nb\n", "a \nb\n\n")
    assert not matches("a\n...\n", "b\na\n")
    assert not matches("a\n", "a\nb\n")
    assert not matches("a\n...\nc...\n", "a\nb\nc d\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"so": so}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}[{number}]", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_print_what_is_shown(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line, shown in commands(page):
        # What is said of a refused option is shown too.
        with contextlib.suppress(SystemExit):
            main(shlex.split(line)[1:])
        out, err = capsys.readouterr()
        assert matches(shown, out + err), f"paste into {page.name}:\n$ {line}\n{out}{err}"


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "docs" / "results" / "theory_simulation.json").read_text())


@pytest.fixture(scope="module")
def script():
    path = ROOT / "benchmarks" / "theory_simulation.py"
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location("theory_simulation", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def test_the_tables_are_those_of_the_measurements(results, script):
    for name, table in (
        ("random_walk", script.table(results)),
        ("off", script.off_table(results["off"])),
    ):
        text = (ROOT / "docs" / "theory" / f"{name}.md").read_text()
        assert table in text, "run benchmarks/theory_simulation.py --draw with the results"


def test_the_measurements_keep_the_promise(results, script):
    """One percent; two where sign and Newton-Schulz are approximated, and along runs with eps."""
    for row in results["equilibrium"]:
        close = 0.02 if re.match("lion|muon", row["case"]) else 0.01
        assert abs(row["norm error"]) < close
        assert abs(row["angle error"]) < close
    for row in results["trajectories"]:
        close = 0.02 if re.match("lion|muon|.*eps", row["case"]) else 0.01
        assert row["worst norm"] < close
        assert row["worst angle"] < close
    assert {row["case"] for row in results["equilibrium"]} == {case.label for case in script.CASES}


def test_quoted_formulas_are_off_and_the_right_ones_are_not(results, script):
    claims = [sys.modules["theory_off"].Claim(**row) for row in results["off"]]
    for claim in claims:
        if claim.measured is None:  # A distance between directions.
            assert claim.quoted_value > 0.1
            assert claim.right_value < 1e-12
        else:
            assert abs(claim.right_value / claim.measured - 1) < 0.015
    close = [c for c in claims if c.measured and abs(c.quoted_value / c.measured - 1) < 0.1]
    # The exception that the page names.
    assert [c.quoted.partition(":")[0] for c in close] == ["lion"]


def test_every_picture_is_there_and_named_by_its_page(results):
    for page in THEORY:
        for picture in re.findall(r"!\[[^\]]+\]\((\S+)\)", page.read_text()):
            path = (page.parent / picture).resolve()
            assert path.exists(), f"{page.name}: {picture}"
            if path.suffix == ".svg":
                assert "<text" in path.read_text(), "text must stay text"
