"""The page of a run: what it holds, that it stands alone, and every kind of log met in the wild."""

import base64
import csv
import io
import re
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from html.parser import HTMLParser

from logs import make_rows, make_run, name, write_log

from sphereopt import cli, cli_report
from sphereopt.report import History, instruments, render, write
from sphereopt.report.drawing import LAYERS
from sphereopt.report.layers import COLUMNS, layer_rows
from sphereopt.report.svg import to_svg


class Page(HTMLParser):
    """Collects tags, ids and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.ids, self.references, self.said = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "xlink:href", "src", "aria-labelledby"):
                self.references.append(value if "href" in key or key == "src" else "#" + value)

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.said.append(data)

    @property
    def text(self):
        return " ".join("".join(self.said).split())


@pytest.fixture(scope="module")
def history():
    rows = make_rows(1000, 6, every=5, odd=("fast",))
    return History.from_rows(rows, [make_run(6, every=5, config={"model": "tiny"})])


@pytest.fixture(scope="module")
def text(history):
    return render(history)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_is_one_document_that_leads_nowhere_else(text, page):
    assert text.startswith("<!DOCTYPE html>")
    assert len(page.ids) == len(set(page.ids))
    inside = [x for x in page.references if not x.startswith("data:")]
    assert {x.removeprefix("#") for x in inside} <= set(page.ids)
    assert not {"link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?:|@import|@font-face|fetch\(|XMLHttp|innerHTML", without_names)


def test_the_policy_lets_only_our_script_run(text):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    policy = policy.replace("&#39;", "'")
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1]


def test_every_chart_is_there_with_its_reading_and_its_label(page):
    charts = [attrs["id"] for tag, attrs in page.tags if tag == "figure"]
    wanted = {one.name for one in instruments.INSTRUMENTS.values()} - {"diffusive-angle"}
    assert set(charts) == {f"chart-{x}" for x in (*wanted, "effective-lr", "metric-0")}
    assert charts[:3] == ["chart-norms", "chart-angles", "chart-effective-lr"]
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert len(labels) == len(charts)
    assert any(re.match(r"Norms: the median layer goes from .* at step 5 to ", x) for x in labels)
    for one in instruments.INSTRUMENTS.values():
        if one.name in wanted:
            assert one.reading in page.text


def test_the_page_says_what_stands_out_and_where_it_is_seen(page):
    assert "The run went through, and one thing needs a look (6 layers" in page.text
    assert f"{name(5)} rotates" in page.text
    assert "#chart-angles" in page.references


def test_the_page_says_settings_and_what_was_not_measured(page):
    for said in ("weight decay", "0.0005", "2.13.0+cpu", "tiny", "5 from step 0", "SGD"):
        assert said in page.text
    assert "diffusive_angle: it takes a whole window of steps, and is sampled." in page.text
    assert "Parameters that are not on spheres are not tracked." in page.text


def test_the_table_has_the_numbers_of_the_log(history):
    norm, angle = history.of("norm"), history.of("angle")
    high = np.flatnonzero(history.settings["lr"][:, 0] >= 0.5 * history.settings["lr"].max())
    late = high[len(high) // 2 :]
    for i, row in enumerate(layer_rows(history)):
        cells = dict(zip([column for column, *_ in COLUMNS], row, strict=True))
        assert cells["weight"].text == name(i)
        assert cells["count"].value == 16 * (i + 1)
        assert cells["first norm"].value == norm[0, i]
        assert cells["last norm"].value == norm[-1, i]
        assert cells["angle"].value == np.median(angle[late, i])
        ratio = np.median(angle[late, i]) / np.median(history.of("equilibrium_angle")[late, i])
        assert cells["ratio"].value == pytest.approx(ratio, rel=1e-12)


def test_the_data_can_be_taken_from_the_page(page, history):
    links = {
        attrs["download"]: attrs["href"]
        for tag, attrs in page.tags
        if tag == "a" and "download" in attrs
    }
    read = {
        file: list(csv.reader(io.StringIO(base64.b64decode(link.split(",", 1)[1]).decode())))
        for file, link in links.items()
    }
    assert [row[0] for row in read["layers.csv"]] == ["weight", *history.names]
    header, *lines = read["curves.csv"]
    assert len(lines) == len(history.steps)  # 200: nothing to average
    at = header.index("norm median layer")
    expected = np.median(history.of("norm"), axis=1)
    assert [float(line[at]) for line in lines] == pytest.approx(expected.tolist(), rel=1e-6)


# Charts


def test_lines_are_the_numbers_of_the_log(history):
    axes = instruments.norms(history).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    median = np.median(history.of("norm"), axis=1)
    assert list(lines["median layer"].get_ydata()) == pytest.approx(median.tolist())
    assert list(lines["median layer"].get_xdata()) == history.steps.tolist()
    settles = history.of("equilibrium_norm")
    for row in (0, 5, 100):  # the mean fourth power of a row and the 9 before it
        fourth = np.mean(settles[max(0, row - 9) : row + 1] ** 4, axis=0)
        assert lines["expected"].get_ydata()[row] == pytest.approx(np.median(fourth**0.25))
    each = [line for line in axes.lines if (line.get_gid() or "").startswith("layer-")]
    assert len(each) == 6
    assert list(each[3].get_ydata()) == pytest.approx(history.of("norm")[:, 3].tolist())


def test_what_is_measured_now_and_then_is_a_line_without_gaps():
    """Between two numbers of a window there are rows without one."""
    rows = list(make_rows(1000, 3, every=10))
    for row in rows[9::10]:
        for entry in row["parameters"].values():
            entry["diffusive_angle"] = entry["angle"]
    history = History.from_rows(rows)
    values = history.of("diffusive_angle")
    there = np.isfinite(values).any(1)
    assert there.sum() == 10
    figure = instruments.diffusive_angles(history)
    (bold,) = (line for line in figure.axes[0].lines if line.get_gid() == "median")
    assert np.array_equal(bold.get_xdata(), history.steps[there])
    assert np.isfinite(bold.get_ydata()).all()


def test_the_heat_map_holds_the_logged_rates(history):
    image = instruments.effective_lrs(history).axes[0].images[0]
    assert image.get_array().shape == (6, 200)
    shown, rates = np.asarray(image.get_array()), history.of("effective_lr")
    assert shown[2, 100] == pytest.approx(rates[100, 2], rel=1e-9)
    assert image.norm.vmax == pytest.approx(rates.max())


def test_uneven_logging_is_drawn_at_its_steps():
    rows = [*make_rows(100, 2, total=5000), *make_rows(4900, 2, start=100, every=50, total=5000)]
    history = History.from_rows(rows)
    image = instruments.effective_lrs(history).axes[0].images[0]
    left, right, *_ = image.get_extent()
    assert (left, right) == (1, 5000)
    shown, rates = np.asarray(image.get_array()), history.of("effective_lr")
    middle = shown[0, shown.shape[1] // 2]
    assert middle == pytest.approx(rates[np.searchsorted(history.steps, 2500), 0], rel=0.05)


@pytest.mark.parametrize("one", [*instruments.INSTRUMENTS.values(), instruments.HEAT_MAP])
def test_drawing_leaves_nothing_behind(history, one):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    if one.name == "diffusive-angle":
        with pytest.raises(ValueError, match="no diffusive_angle was logged"):
            instruments.draw(history, one)
        return
    first, second = (to_svg(instruments.draw(history, one), "x", "y") for _ in range(2))
    assert first == second
    assert dict(mpl.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_instruments_take_paths_rows_and_histories(tmp_path):
    rows = list(make_rows(50, 2))
    path = write_log(tmp_path / "run.jsonl", rows, [make_run(2)])
    drawn = [instruments.angles(log) for log in (path, str(path), rows, History.from_rows(rows))]
    assert len({to_svg(figure, "x", "y") for figure in drawn}) == 1
    with pytest.raises(ValueError, match=r"no metric 'acc' was logged; there are: loss"):
        instruments.metric(rows, "acc")


# Logs met in the wild


def old(rows):
    """Return rows as they were before there were headers, kinds and most probes."""
    kept = ("sphere", "lr", "count", "norm", "angle", "effective_lr", "relative_update")
    return [
        {
            "step": row["step"],
            "parameters": {
                name: {key: entry[key] for key in kept} for name, entry in row["parameters"].items()
            },
        }
        for row in rows
    ]


def test_an_old_log_gives_a_page_that_says_what_it_lacks():
    page = Page(render(old(make_rows(200, 3))))
    charts = [attrs["id"] for tag, attrs in page.tags if tag == "figure"]
    assert charts == ["chart-norms", "chart-angles", "chart-effective-lr", "chart-relative-update"]
    assert "Not in this log, which has no header: grad_radial_share" in page.text
    assert "cos(g, w)" not in page.text.split("What could not")[0].split("Layers")[-1]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("layers", [1, 2])
def test_very_short_logs_give_a_page(steps, layers):
    page = Page(render(list(make_rows(steps, layers))))
    assert sum(tag == "figure" for tag, _ in page.tags) >= 8


def test_a_log_that_begins_late_says_so():
    page = Page(render(list(make_rows(1000, 2, start=5000, every=10))))
    assert "5,010 to 6,000" in page.text
    assert "Steps before 5,010 are not in the log." in page.text


def test_a_probe_of_nulls_is_left_out_and_named():
    rows = list(make_rows(100, 2, every=10))
    for row in rows:
        for entry in row["parameters"].values():
            entry["scaled_grad_norm"] = dict.fromkeys(entry["norm"])
    run = make_run(2, every=10, probes=["norm", "angle", "scaled_grad_norm"])
    page = Page(render(History.from_rows(rows, [run])))
    assert "chart-scaled-grad-norm" not in page.ids
    assert "diffusive_angle: the tracker was not asked." in page.text
    assert "scaled_grad_norm: no layer gave a number." in page.text


def test_all_numbers_null_is_a_page_about_it():
    rows = list(make_rows(100, 2, every=10))
    for row in rows:
        for entry in row["parameters"].values():
            for key, value in entry.items():
                if isinstance(value, dict):
                    entry[key] = dict.fromkeys(value)
    page = Page(render(rows))
    assert "Something broke" in page.text
    assert "is not a number since step 10" in page.text


def test_layers_that_come_and_go_give_a_page():
    odd = ("still", "fast", "radial", "growing", "nan", "late", "gone")
    page = Page(render(list(make_rows(400, 9, every=4, odd=odd))))
    assert "Something broke: 2 faults" in page.text


def test_names_of_all_kinds_are_shown_as_they_are():
    names = [
        "<script>alert(1)</script>",
        "_orig_mod.$w$.weight",
        "层.权重",
        '"><img src=x>',
        "a" * 300,
    ]
    rows = list(make_rows(40, len(names), every=4))
    for row in rows:
        row["parameters"] = dict(zip(names, row["parameters"].values(), strict=True))
    text = render(rows)
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in page.tags}
    for one in names:
        assert one in "".join(page.said)


def test_hundreds_of_layers_are_aggregated():
    layers = 3 * LAYERS
    history = History.from_rows(make_rows(40, layers, every=4))
    text = render(history)
    assert not any("-layer-" in x for x in Page(text).ids)
    assert "Each row is the mean of 3 neighbours." in text
    assert len(text) < 1_500_000
    image = instruments.effective_lrs(history).axes[0].images[0]
    logs = np.log(history.of("effective_lr")[5, :3])
    assert np.asarray(image.get_array())[0, 5] == pytest.approx(np.exp(logs.mean()), rel=1e-9)


def test_resumes_and_their_settings_are_shown():
    rows = [*make_rows(50, 2, total=100), *make_rows(60, 2, start=40, total=100)]
    runs = [make_run(2), make_run(2, start=40, device="cuda")]
    page = Page(render(History.from_rows(rows, runs)))
    assert "Begun" in page.text
    assert "Resumed" in page.text
    assert "cuda" in page.text
    assert "superseded" in page.text


def test_nothing_to_show_is_an_error():
    with pytest.raises(ValueError, match="no parameter was logged"):
        render([{"step": 1, "parameters": {}}])


# The command


def main(argv):
    parser = cli._Parser(prog="sphereopt")
    cli_report.add_command(parser.add_subparsers())
    args = parser.parse_args(argv)
    return args.run(args)


def test_the_command_writes_the_page_and_says_what_stands_out(tmp_path, capsys):
    path = write_log(tmp_path / "run.jsonl", make_rows(300, 5, every=3, odd=("fast",)))
    assert main(["report", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("The run went through, and 2 things need a look")
    assert f"- {name(4)} rotates" in out
    assert out.splitlines()[-1].endswith(str(tmp_path / "run.html"))
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == render(path)
    assert main(["report", str(path), "-o", str(tmp_path / "deep" / "page.html")]) == 0
    assert write(path, tmp_path / "again.html").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"\x00\xff\n" * 50), "line 1"),
        (lambda path: path.write_text('{"a": 1}\n{"b": 2}\n'), "line 1"),
    ],
    ids=["missing", "empty", "binary", "foreign"],
)
def test_a_log_that_cannot_be_read_is_one_line_and_code_2(make, message, tmp_path, capsys):
    make(tmp_path / "run.jsonl")
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path / "run.jsonl")])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "run.html").exists()


def test_a_page_that_cannot_be_written_is_one_line_and_code_2(tmp_path, capsys):
    path = write_log(tmp_path / "run.jsonl", make_rows(10, 2))
    for output, said in ((tmp_path, "cannot be written"), (path, "is the log itself")):
        with pytest.raises(SystemExit) as caught:
            main(["report", str(path), "-o", str(output)])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err
    assert path.stat().st_size > 100
