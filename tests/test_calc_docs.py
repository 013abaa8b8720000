"""The pages of the command show what it prints, and their Python prints what they say."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from sphereopt.cli import main

DOCS = Path(__file__).parent.parent / "docs"
CONSOLE = [
    (page, *block)
    for page in ("calc.md", "theory/questions.md")
    for block in re.findall(
        r"```console\n\$ (.*?[^\\])\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL
    )
]


def shows(expected, out):
    """Return whether all parts between lines of dots are in the output, in order."""
    parts = re.split(r"^\.\.\.\n", expected, flags=re.MULTILINE)
    pattern = r"(?:.*\n)*?".join(re.escape(part) for part in parts)
    return re.fullmatch(pattern, out) is not None


@pytest.mark.parametrize(("page", "command", "expected"), CONSOLE)
def test_output_is_that_of_the_command(page, command, expected, capsys):
    argv = shlex.split(command.replace("\\\n", " "))
    assert argv[:2] == ["sphereopt", "calc"]
    assert main(argv[1:]) == 0
    assert shows(expected, capsys.readouterr().out), page


def test_dots_do_not_hide_differences():
    out = "a\nb\nc\nd\n"
    assert shows("a\n...\nd\n", out)
    assert shows("...\nc\nd\n", out)
    assert shows("...\nb\n...\n", out)
    assert not shows("a\nc\n...\n", out)
    assert not shows("b\n...\n", out)
    assert not shows("a\n...\nb\n", out)
    assert not shows("...\nc\n...\nb\n...\n", out)


def test_errors_are_as_shown(capsys):
    (command, line) = re.search(
        r"\n```\n\$ (.*)\n(.*)\n```", (DOCS / "calc.md").read_text()
    ).groups()
    with pytest.raises(SystemExit):
        main(shlex.split(command)[1:])
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(("page", "blocks"), [("questions.md", 7), ("logs.md", 4)])
def test_python_prints_what_the_page_says(page, blocks):
    text = (DOCS / "theory" / page).read_text()
    names, found, said = {}, [], []
    for code in re.findall(
        r"```python\n(.*?)```(?:\n\nprints `(.*?)` and `(.*?)`)?", text, flags=re.S
    ):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code[0], names)
        found.append(out.getvalue().splitlines())
        said.append(re.findall(r"^print\(.*\)  # (.*)$", code[0], flags=re.M) or list(code[1:]))
    assert len(found) == blocks
    assert found == said
