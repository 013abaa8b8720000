"""The page of a run in a real browser: it draws, sorts, adapts, and lets nothing in or out."""

import base64

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from browser import Visit, browser, contrast
from logs import make_rows, make_run

from sphereopt.report import History, write
from sphereopt.report.layers import COLUMNS

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</script><script>alert(3)</script>",
    "{{ 7 * 7 }}.weight",
)
#: WCAG 2.2 AA for text.
READABLE = 4.5


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    odd = ("fast", "radial", "nan", "late")
    history = History.from_rows(make_rows(2000, 12, every=10, odd=odd), [make_run(12, every=10)])
    return write(history, tmp_path_factory.mktemp("page") / "run.html")


def column(page, name):
    """Return the texts of a column and the button that sorts it."""
    index = [heading for heading, *_ in COLUMNS].index(name)
    cells = page.locator(f".sortable tbody tr > :nth-child({index + 1})").all_inner_texts()
    return cells, page.locator(".sortable thead button").nth(index)


def numbers(cells):
    return [float(x.replace(",", "")) for x in cells if x != "–"]


def test_the_page_opens_without_a_complaint_or_a_request(chromium, path):
    visit = Visit(chromium, path)
    with visit:
        assert visit.complaints == []
        assert [x for x in visit.requests if not x.startswith("data:")] == [path.as_uri()]


def test_every_chart_has_a_size_and_text_that_does_not_leave_it(chromium, path):
    with Visit(chromium, path) as page:
        boxes = [svg.bounding_box() for svg in page.locator("figure svg").all()]
        assert len(boxes) == 11
        assert all(box["width"] > 300 and box["height"] > 150 for box in boxes)
        assert page.locator("#chart-effective-lr image").first.bounding_box()["width"] > 300
        outside = page.eval_on_selector_all(
            "figure svg",
            """all => all.flatMap(svg => {
              const frame = svg.getBoundingClientRect();
              return [...svg.querySelectorAll("text")].filter(t => {
                const box = t.getBoundingClientRect();
                return box.right > frame.right + 1 || box.left < frame.left - 1;
              }).map(t => svg.parentNode.id + ": " + t.textContent);
            })""",
        )
        assert outside == []


def test_a_click_sorts_numbers_as_numbers_both_ways(chromium, path):
    with Visit(chromium, path) as page:
        _, button = column(page, "count")
        for order in ("ascending", "descending"):
            button.click()
            cells = numbers(column(page, "count")[0])
            assert cells == sorted(cells, reverse=order == "descending")
            assert max(cells) == 192  # 1 before 16 before 112: not as text
            assert button.locator("xpath=..").get_attribute("aria-sort") == order
        assert page.locator("th[aria-sort]").count() == 1


def test_what_has_no_number_stays_last(chromium, path):
    with Visit(chromium, path) as page:
        _, button = column(page, "angle")
        for _ in range(2):
            button.click()
            cells, _ = column(page, "angle")
            # The layer that is logged late has none over the steady part.
            missing = cells.count("–")
            assert 0 < missing < len(cells)
            assert cells[-missing:] == ["–"] * missing


def test_names_are_sorted_as_people_count(chromium, path):
    with Visit(chromium, path) as page:
        _, button = column(page, "weight")
        button.click()
        assert column(page, "weight")[0] == [f"layer{i}.conv.weight" for i in range(12)]


def test_the_keyboard_reaches_the_headings_and_sorts(chromium, path):
    with Visit(chromium, path) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent") == "last norm":
                break
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        cells = numbers(column(page, "last norm")[0])
        assert cells == sorted(cells)
        page.keyboard.press("Space")
        cells = numbers(column(page, "last norm")[0])
        assert cells == sorted(cells, reverse=True)


def test_a_row_marks_its_lines_by_pointer_and_by_arrow_keys(chromium, path):
    with Visit(chromium, path) as page:
        rows = page.locator(".sortable tbody tr")
        rows.nth(1).hover()
        marked = "[...document.querySelectorAll('svg .on')].map(x => x.id)"
        found = page.evaluate(marked)
        assert "norms-layer-1" in found
        assert all(x.endswith("-layer-1") for x in found)
        page.mouse.move(0, 0)
        assert page.evaluate(marked) == []
        rows.nth(0).focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        assert "angles-layer-2" in page.evaluate(marked)
        assert page.locator(".sortable tbody tr[tabindex='0']").count() == 1


def test_findings_lead_to_their_charts(chromium, path):
    with Visit(chromium, path) as page:
        link = page.locator("#findings .finding a").first
        target = link.get_attribute("href")
        link.click()
        assert page.url.endswith(target)
        assert page.locator(target).bounding_box()["y"] < 200


def test_landmarks_headings_and_the_caption_are_there(chromium, path):
    with Visit(chromium, path) as page:
        for role in ("banner", "navigation", "main"):
            assert page.get_by_role(role).count() == 1
        assert page.get_by_role("heading", level=1).count() == 1
        assert page.get_by_role("img").count() == 11
        assert page.locator("table.sortable caption").count() == 1
        assert page.get_by_role("columnheader").count() >= len(COLUMNS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_readable(chromium, path, scheme):
    grounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
    with Visit(chromium, path, color_scheme=scheme) as page:
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == grounds[scheme]
        selector = "h1, h2, h3, p, a, td, th, caption, dt, dd, li, figcaption, summary"
        ratios = contrast(page, f"{selector}, figure svg text")
        assert len(ratios) > 200
        assert min(ratios) >= READABLE


def test_print_is_black_on_white_and_shows_all(chromium, path):
    with Visit(chromium, path, color_scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
        assert not page.locator("nav").is_visible()
        assert min(contrast(page, "p, td, th, figure svg text")) >= READABLE
        table = page.locator("table.sortable").bounding_box()
        assert table["width"] <= 1200
        assert len(page.pdf()) > 50_000


def test_a_phone_scrolls_in_one_direction_only(chromium, path):
    with Visit(chromium, path, width=360, height=740) as page:
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360
        assert page.locator("#chart-norms svg").bounding_box()["width"] <= 360


def test_hostile_names_do_not_run_and_are_shown(chromium, tmp_path):
    rows = list(make_rows(60, len(HOSTILE), every=5, odd=("nan",)))
    for row in rows:
        row["parameters"] = dict(zip(HOSTILE, row["parameters"].values(), strict=True))
        row["metrics"] = {HOSTILE[0]: 1.0, "javascript:alert(4)": 2.0}
    run = make_run(0, config={HOSTILE[1]: HOSTILE[2]}, device=HOSTILE[0])
    run["groups"][0]["names"] = list(HOSTILE)
    visit = Visit(chromium, write(History.from_rows(rows, [run]), tmp_path / "run.html"))
    with visit as page:
        assert visit.dialogs == []
        assert visit.complaints == []
        assert len(visit.requests) == 1 + sum(x.startswith("data:") for x in visit.requests)
        assert column(page, "weight")[0] == list(HOSTILE)
        assert page.locator("script").count() == 1


def test_a_script_that_got_in_would_not_run(chromium, path, tmp_path):
    """The page's policy is the second lock: it is tried with the first one broken open."""
    other = tmp_path / "run.html"
    text = path.read_text(encoding="utf-8")
    evil = "<script>alert(1)</script><img src='https://example.com/x.png' onerror='alert(2)'>"
    other.write_text(text.replace("<main", evil + "<main"), encoding="utf-8")
    visit = Visit(chromium, other)
    with visit:
        assert visit.dialogs == []
        assert any("Content Security Policy" in x for x in visit.complaints)


def test_the_downloads_hold_what_they_say(chromium, path):
    with Visit(chromium, path) as page:
        with page.expect_download() as download:
            page.get_by_role("link", name="the table (CSV)").click()
        assert download.value.suggested_filename == "layers.csv"
        href = page.get_by_role("link", name="the table (CSV)").get_attribute("href")
        saved = download.value.path().read_bytes()
        assert saved == base64.b64decode(href.split(",", 1)[1])
        assert saved.startswith(b"weight,")


def test_a_long_run_of_many_layers_is_a_small_page_that_still_sorts(chromium, tmp_path):
    rows = make_rows(100_000, 100, every=50)
    path = write(History.from_rows(rows, [make_run(100, every=50)]), tmp_path / "run.html")
    assert path.stat().st_size < 5_000_000
    visit = Visit(chromium, path)
    with visit as page:
        assert visit.complaints == []
        _, button = column(page, "effective lr")
        button.click()
        cells = numbers(column(page, "effective lr")[0])
        assert len(cells) == 100
        assert cells == sorted(cells)
        assert page.evaluate("document.body.scrollHeight") < 10_000
