"""The page of a difference in a real browser, and the command that writes it."""

import argparse
import json
import re

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from browser import Visit, browser, contrast
from logs import make_rows, make_run, name, write_log

from sphereopt import cli_diff
from sphereopt.report import History
from sphereopt.report.diff.difference import diff
from sphereopt.report.diff.page import render_diff, write_diff

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "{{ 7 * 7 }}.$w")
#: WCAG 2.2 AA for text.
READABLE = 4.5
LAYERS = 12


def logs(folder, layers=LAYERS):
    """Write two runs: the second has four times the decay, and a layer that is not invariant."""
    one = write_log(folder / "a.jsonl", make_rows(2000, layers, every=10), [make_run(layers)])
    run = make_run(layers)
    run["groups"][0]["weight_decay"] = 2e-3
    rows = make_rows(2000, layers, every=10, weight_decay=2e-3, odd=("radial", "nan"))
    return one, write_log(folder / "b.jsonl", rows, [run])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return logs(tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def path(pair, tmp_path_factory):
    return write_diff(*pair, tmp_path_factory.mktemp("page") / "diff.html")


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


def run(*args):
    parser = argparse.ArgumentParser(prog="sphereopt")
    cli_diff.add_command(parser.add_subparsers())
    found = parser.parse_args(["diff", *map(str, args)])
    return found.run(found)


def error(capsys, *args):
    """Return the one line that a command leaves with."""
    with pytest.raises(SystemExit) as left:
        run(*args)
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.strip().splitlines()[-1]


def test_the_page_opens_without_a_complaint_or_a_request(chromium, path):
    visit = Visit(chromium, path)
    with visit:
        assert visit.complaints == []
        assert [x for x in visit.requests if not x.startswith("data:")] == [path.as_uri()]


def test_every_chart_is_there_with_both_runs_on_its_axes(chromium, path):
    with Visit(chromium, path) as page:
        ids = [x.get_attribute("id") for x in page.locator("figure").all()]
        assert ids == [
            *("chart-norm", "chart-angle", "chart-effective-lr", "chart-metric-0"),
            *("chart-ratio-norm", "chart-ratio-angle"),
        ]
        for box in (x.bounding_box() for x in page.locator("figure svg").all()):
            assert box["width"] > 300
            assert box["height"] > 130
        for chart in ("norm", "angle", "effective-lr"):
            for label in "ab":
                line = page.locator(f"#{chart}-run-{label}").bounding_box()
                assert line["width"] > 200
            dashes = [
                page.locator(f"#{chart}-run-{label} path").evaluate(
                    "x => getComputedStyle(x).strokeDasharray"
                )
                for label in "ab"
            ]
            assert dashes[0] == "none"
            assert dashes[1] != "none"
        assert page.locator("#chart-ratio-norm image").first.bounding_box()["width"] > 300


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_light_and_dark(chromium, path, scheme):
    with Visit(chromium, path, color_scheme=scheme) as page:
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 23, 27)" if scheme == "dark" else "rgb(255, 255, 255)")
        assert min(contrast(page, "p, td, th, dd, figcaption, a, figure svg text")) >= READABLE


def test_the_table_sorts_numbers_and_keeps_the_missing_last(chromium, path):
    visit = Visit(chromium, path)
    with visit as page:
        headings = page.locator(".sortable thead button").all_inner_texts()
        column = headings.index("angle")
        page.locator(".sortable thead button").nth(column).click()
        texts = visit.column(column)
        assert len(texts) == LAYERS
        values = [float(re.match(r"[\d.]+", x)[0]) for x in texts if x != "–"]
        assert values == sorted(values)
        assert "–" not in texts[: len(values)]


def test_a_phone_scrolls_in_one_direction_only(chromium, path):
    with Visit(chromium, path, width=360, height=740) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_page_is_printed_on_white_with_all_of_its_tables(chromium, path):
    with Visit(chromium, path, color_scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(255, 255, 255)"
        assert not page.locator("nav").is_visible()
        assert len(page.pdf()) > 30_000


def test_hostile_names_do_not_run_and_are_shown(chromium, tmp_path):
    def hostile(decay):
        rows = list(make_rows(300, len(HOSTILE), every=5, weight_decay=decay))
        for row in rows:
            row["parameters"] = dict(zip(HOSTILE, row["parameters"].values(), strict=True))
            row["metrics"] = {HOSTILE[0]: 1.0 + decay, "$_{^": 2.0}
        head = make_run(0, config={HOSTILE[1]: HOSTILE[2] + str(decay)}, device=HOSTILE[0])
        head["groups"][0] |= {"names": list(HOSTILE), HOSTILE[0]: f"{HOSTILE[1]}{decay}"}
        return History.from_rows(rows, [head])

    visit = Visit(chromium, write_diff(hostile(5e-4), hostile(5e-3), tmp_path / "diff.html"))
    with visit as page:
        assert visit.dialogs == []
        assert visit.complaints == []
        assert sorted(visit.column(0)) == sorted(HOSTILE)
        assert page.locator("script").count() == 1
        assert page.locator("img").count() == 0


@pytest.mark.parametrize("layers", [1, 300])
def test_runs_of_any_size_have_a_page(layers, tmp_path):
    one, two = (
        History.from_rows(make_rows(200, layers, every=20, seed=seed), [make_run(layers)])
        for seed in range(2)
    )
    text = render_diff(diff(one, two))
    assert len(text) < 3_000_000
    assert text.count("<tr data-layer") == layers


def test_runs_without_anything_in_common_have_a_page():
    one = History.from_rows(make_rows(100, 2), [make_run(2)])
    late = History.from_rows(make_rows(100, 2, start=500, total=600), [make_run(2)])
    rows = [{"step": 1, "parameters": {"other": {"norm": {"median": 1.0}}}}]
    assert "no steps in common" in render_diff(diff(one, late))
    assert "No parameter is tracked in both runs" in render_diff(diff(one, History.from_rows(rows)))


def test_the_command_says_by_its_code_whether_runs_differ(pair, capsys):
    assert run(pair[0], pair[0]) == 0
    assert "The two logs are identical." in capsys.readouterr().out
    assert run(*pair) == 1
    said = capsys.readouterr().out
    assert "because of weight decay 0.0005 → 0.002" in " ".join(said.split())
    assert "and 2 more layers; --all shows them" in said
    assert run(*pair, "--all") == 1
    assert "more layers" not in capsys.readouterr().out
    assert run(*pair, "--tolerance", "1e9") == 1  # the settings differ all the same


def test_json_goes_to_the_output_alone_or_to_a_file(pair, tmp_path, capsys):
    assert run(*pair, "--json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["layers"][0]["name"] == name(LAYERS - 1)
    assert run(*pair, "--json", tmp_path / "new" / "diff.json") == 1
    assert json.loads((tmp_path / "new" / "diff.json").read_text()) == printed
    assert capsys.readouterr().out.startswith("a  ")


def test_the_command_writes_the_page_and_says_where(pair, tmp_path, capsys):
    page = tmp_path / "new" / "diff.html"
    assert run(*pair, "-o", page) == 1
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out.endswith(f"The page with the charts: {page}\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory"),
        ("", "is empty"),
        ('{"epoch": 1, "loss": 0.3}\n', "not a row of sphereopt"),
        ('{"step": 1, "parameters": {}}\nnonsense\n{}\n', "line 2: not JSON"),
        ("\x1f\x8b", "not UTF-8|not JSON|gzip"),
    ],
)
def test_a_log_that_cannot_be_read_is_one_line(pair, tmp_path, capsys, content, said):
    bad = tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_bytes(content.encode("latin-1"))
    for args in ((bad, pair[0]), (pair[0], bad)):
        line = error(capsys, *args)
        assert line.startswith("sphereopt diff: error: ")
        assert "bad.jsonl" in line
        assert re.search(said, line)


def test_options_that_cannot_be_used_are_said_before_anything_is_written(pair, tmp_path, capsys):
    before = [x.read_bytes() for x in pair]
    assert "is one of the logs" in error(capsys, *pair, "-o", pair[1])
    assert "is one of the logs" in error(capsys, *pair, "--json", pair[0])
    same = tmp_path / "x"
    assert "is the page as well" in error(capsys, *pair, "-o", same, "--json", same)
    assert "must be positive" in error(capsys, *pair, "--tolerance", "0")
    assert "cannot be written" in error(capsys, *pair, "-o", tmp_path)
    error(capsys, "--json", *pair)  # without "--json FILE" after the logs, FILE is a log
    assert [x.read_bytes() for x in pair] == before
    assert not same.exists()
