"""docs/report.md: its code runs, and what it says of thresholds is what the checks hold."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from logs import make_rows, write_log

import sphereopt as so
from sphereopt.report import instruments
from sphereopt.report.checks import broken, direction, settling
from sphereopt.report.instruments import HEAT_MAP, INSTRUMENTS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "report.md").read_text(encoding="utf-8")


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_log("run.jsonl", make_rows(300, 4, every=3))
    names = {"so": so}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    assert "Norms were 22 % below" in Path("run.html").read_text(encoding="utf-8")
    assert Path("angles.png").stat().st_size > 1000
    assert names["history"].of("angle").shape == (100, 4)
    assert "Angles" in capsys.readouterr().out


def test_every_instrument_is_on_the_page_with_its_function():
    rows = dict(re.findall(r"^\| ([A-Z][\w ]+) \| `(\w+)` \|", PAGE, flags=re.M))
    titles = {one.title.removesuffix(", by layer") for one in (*INSTRUMENTS.values(), HEAT_MAP)}
    assert set(rows) == titles
    assert all(callable(getattr(instruments, function)) for function in rows.values())


@pytest.mark.parametrize(
    ("finding", "said", "held"),
    [
        ("does not turn", "$10^{-6}$", broken._GONE == 1e-6),
        ("does not turn", "3 rows and 2 %", (broken._ROWS, broken._SHARE) == (3, 0.02)),
        ("gradient vanished", "$10^4$", broken._APART == 1e-4),
        ("not scale-invariant", "0.01", direction._RADIAL == 0.01),
        ("rotates", "4 times", direction._FASTER == 4),
        ("rotates", "12 times", direction._FASTER_FREE == 12),
        ("rotates", "last tenth", direction._SHARE == 0.1),
        ("norm of a fixed", "1 %", settling._DRIFT == 0.01),
        ("before equilibrium", "20 %", settling._NORM == 0.2),
        ("before equilibrium", "4 relaxation", settling._LONG == 4),
        ("growth is missing", "a quarter", settling._LOST == 0.25),
        ("growth is missing", "ten standard errors", settling._SURE == 10),
        ("effective lr", "4 times", direction._FADED == 4),
        ("angles followed", "10 %", settling._ANGLE == 0.1),
    ],
)
def test_thresholds_on_the_page_are_those_of_the_checks(finding, said, held):
    row = re.search(rf"^\| {finding}[^|]*\|[^|]*\|([^|\n]|\\lvert)*\|", PAGE, flags=re.M)[0]
    assert said in row
    assert held


def test_the_picture_is_small_and_says_what_the_page_says_of_it():
    for name in ("report", "diff"):
        assert (DOCS / "results" / f"{name}.png").stat().st_size < 300_000
    facts = json.loads((DOCS / "results" / "report.json").read_text())
    assert facts["findings"][0].startswith("14.weight is not scale-invariant")
    assert {"versions", "machine", "date"} <= set(facts)
