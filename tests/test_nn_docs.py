"""The pages on normalization layers: their code runs, their table is the library's."""

import re
from pathlib import Path

import pytest

from sphereopt.nn import INVARIANCES

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ["nn/index.md", "nn/weights.md", "nn/sphere_map.md", "nn/convert.md"]


def printed(page):
    """Run the code of a page from an empty namespace; return the lines of code that ran."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    return blocks


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_the_page_runs(page):
    assert printed(page)


def test_what_the_pages_say_they_print_is_what_they_print(capsys):
    printed("nn/index.md")
    assert capsys.readouterr().out == "row block:4\n"
    printed("nn/convert.md")
    shown = re.findall(r"```\n\n((?:    .*\n)+)", (DOCS / "nn/convert.md").read_text())[0]
    assert capsys.readouterr().out == shown.replace("\n    ", "\n").removeprefix("    ")
    printed("nn/weights.md")
    assert capsys.readouterr().out == "tensor(True)\nrow\n"
    printed("nn/sphere_map.md")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("2.6458") == 4
    assert lines[2:] == ["tensor([5, 5, 5, 5])", "tensor(True)", "True"]


def test_the_table_of_invariances_is_the_librarys():
    rows = [
        f"| {r.name} | {r.over} | {r.sphere or 'none'} | {r.bias or ''} | {r.shift or 'none'} | "
        f"{r.data or 'none'} | {r.manifold} |"
        for r in INVARIANCES.values()
    ]
    page = (DOCS / "nn/index.md").read_text()
    table = page.partition("<!-- table")[2].partition("<!-- end -->")[0].splitlines()[3:]
    assert table == rows, "\n".join(rows)
