"""The page: what it says, that it stands alone, and that drawing leaves nothing behind."""

import json
import re
import sys
from copy import deepcopy
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("sklearn")

from sphereopt.monitor import read_jsonl
from sphereopt.report import comparison as report
from sphereopt.report.comparison import figures
from sphereopt.report.comparison.summary import arm_rows, layer_rows, number
from sphereopt.report.svg import COLOURS, GRID, INK, to_svg
from sphereopt.train import Config, train

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Document(HTMLParser):
    """Collects what a browser would see; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.references, self.tags = [], [], [], []
        self.text = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.see(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.see(tag, attrs)

    def see(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
            if key in ("href", "xlink:href", "src"):
                self.references.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    results = train(Config(steps=30), folder)
    (folder / "results.json").write_text(json.dumps(results.to_dict()))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def rows(folder, results):
    return {name: read_jsonl(folder / f"{name}.jsonl") for name in results["arms"]}


@pytest.fixture(scope="module")
def page(results, rows):
    return report.render(results, rows)


# The page


def test_page_is_one_sound_document(page):
    assert page.startswith("<!DOCTYPE html>")
    assert page.lower().count("<!doctype") == 1
    assert "<?xml" not in page
    document = Document(page)
    tags = [tag for tag, _ in document.tags]
    assert tags.count("svg") == tags.count("figure") == tags.count("figcaption") == 6
    assert "script" not in tags
    assert "link" not in tags


def test_page_needs_no_network(page):
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?:|//\w+\.\w+/|@import|@font-face", without_names)


def test_ids_are_unique_and_references_lead_to_them(page):
    document = Document(page)
    assert len(document.ids) == len(set(document.ids)) > 100
    assert document.references
    assert {reference.removeprefix("#") for reference in document.references} <= set(document.ids)


def test_page_adapts(page):
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    for colour in (INK, GRID, *COLOURS.values()):
        assert f"stroke: {colour}" not in page
        assert f"fill: {colour}" not in page
    for name in ("--grid", *(f"--{arm}" for arm in COLOURS)):
        assert f"var({name})" in page
        assert page.count(f"{name}: #") == 3  # light, dark, print
    assert "currentColor" in page
    for tag, attributes in Document(page).tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
            assert "viewbox" in attributes
            assert "width" not in attributes


def test_page_is_small(page):
    assert len(page.encode()) < 500_000


def test_text_of_the_user_is_escaped(results, rows):
    evil = '<script>alert("x")</script>'
    other = deepcopy(results)
    other["config"]["data"] = other["data"]["name"] = evil
    page = report.render(other, rows)
    assert "<script>" not in page
    assert evil in "".join(Document(page).text)


def test_page_shows_the_numbers_of_the_run(page, results):
    text = " ".join("".join(Document(page).text).split())
    for arm in results["arms"].values():
        assert f"{arm['angle']:.5f}" in text
        assert f"{100 * arm['test_accuracy']:.1f} %" in text
    assert number(results["arms"]["free"]["loss_gap"]) in text
    for name in (*results["spheres"], *results["versions"].values()):
        assert name in text
    assert "What is not shown" in text


def test_write_reads_files_only(folder, page):
    path = report.write(folder)  # also: the same numbers give the same page
    assert path.read_text(encoding="utf-8") == page


# The verdict


def test_verdict_when_all_is_well(results):
    follows, _, told, accuracy = report.verdict(results)
    assert follows.holds is True
    assert "(b) followed (a)" in follows.headline
    assert told.holds is True
    assert accuracy.holds is None


def test_verdict_says_when_free_parts(results):
    other = deepcopy(results)
    other["arms"]["free"]["loss_gap"] = 0.25
    other["arms"]["free"]["loss"][0] += 1e-3
    finding = report.verdict(other)[0]
    assert finding.holds is False
    assert "0.25" in finding.text
    assert "by up to 1.0e-03" in finding.text  # what it was in the first steps


@pytest.mark.parametrize(
    ("factor", "holds", "word"),
    [(1.0, True, "as fast as calculated"), (0.8, False, "slower"), (1.3, False, "faster")],
)
def test_verdict_on_the_angle(results, factor, holds, word):
    other = deepcopy(results)
    half = other["config"]["steps"] // 2
    for point in other["forecast"]:
        point["angle"] = 0.02 if point["step"] > half else 7.0  # the first half does not count
    other["arms"]["sgd"]["angle"] = factor * 0.02
    finding = report.verdict(other)[1]
    assert finding.holds is holds
    assert word in finding.headline
    if not holds:
        assert f"{100 * abs(factor - 1):.0f} %" in finding.text


def test_verdict_when_fixed_does_not_turn_as_told(results):
    other = deepcopy(results)
    other["arms"]["fixed"]["angle"] *= 1.01
    assert report.verdict(other)[2].holds is False


def test_nothing_is_called_better(page):
    assert not re.search(
        r"\b(better|superior|outperform\w*|wins?|beats?)\b",
        page.replace("Whether fixed norms train better.", ""),
    )


# Figures and tables

DRAWN = {
    "norms": lambda results, rows: figures.norms(results),
    "layers": figures.layers,
    "angles": lambda results, rows: figures.angles(results),
    "accuracy": lambda results, rows: figures.accuracy(results),
    "loss": lambda results, rows: figures.loss(results),
    "loss_gap": lambda results, rows: figures.loss_gap(results),
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawing_changes_nothing_global(results, rows, name):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    kept = deepcopy((results, rows))
    to_svg(DRAWN[name](results, rows), name, "a figure")
    assert dict(mpl.rcParams) == before
    assert (results, rows) == kept
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_norm_figure_draws_the_numbers(results):
    lines = {line.get_label(): line for line in figures.norms(results).axes[0].lines}
    assert set(lines) == {
        "calculated for (a)",
        "(a) stored norm",
        "(b) virtual radius",
        "(b) stored norm",
        "(c) stored norm",
    }
    virtual = [p["believed"]["median"] for p in results["arms"]["free"]["norms"]]
    assert list(lines["(b) virtual radius"].get_ydata()) == virtual
    assert list(lines["(a) stored norm"].get_ydata()) == pytest.approx(virtual, rel=1e-9)


def test_gap_figure_takes_the_largest_of_each_stretch(results):
    other = deepcopy(results)
    other["config"]["steps"] = 1000
    other["arms"]["sgd"]["loss"] = [0.0] * 1000
    for name in ("free", "fixed"):
        other["arms"][name]["loss"] = [1e-9] * 1000
    other["arms"]["free"]["loss"][500] = -0.5
    axes = figures.loss_gap(other).axes[0]
    assert max(axes.lines[0].get_ydata()) == 0.5
    assert max(axes.lines[1].get_ydata()) == 1e-9
    assert axes.get_yscale() == "log"


def test_runs_without_any_gap_are_drawn(results):
    other = deepcopy(results)
    for arm in other["arms"].values():
        arm["loss"] = [1.0] * 30
    to_svg(figures.loss_gap(other), "gap", "no gap")


def test_svg_label_is_escaped(results):
    svg = to_svg(figures.loss(results), "x", 'a "quoted" <label>')
    assert 'aria-label="a &quot;quoted&quot; &lt;label&gt;"' in svg


def test_tables(results, rows):
    table = arm_rows(results)
    assert [row[0] for row in table] == ["(a) sgd", "(b) free", "(c) fixed"]
    assert table[0][-1] == ""
    assert "virtual" in table[1][3]
    assert "stored" in table[1][3]
    assert "\n" not in table[2][3]
    layers = layer_rows(results, rows)
    assert [layer["count"] for layer in layers] == [8, 16, 32]
    # The mean over layers, weighted by their spheres, is the arm's mean over spheres.
    for i, arm in enumerate(results["arms"].values()):
        weighted = sum(layer["count"] * float(layer["arms"][i][2]) for layer in layers) / 56
        assert weighted == pytest.approx(arm["angle"], abs=1e-5)  # five digits are shown
