"""A headless Chromium that opens a page from a file and says what happened."""

import shutil
from contextlib import contextmanager

import pytest

PATH = next((p for p in map(shutil.which, ("chromium", "chromium-browser")) if p), None)


@contextmanager
def browser():
    """Yield a Chromium, or skip the test with the reason."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if PATH is None:
        pytest.skip("no chromium on PATH")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=PATH, args=["--no-sandbox"])
        yield found
        found.close()


class Visit:
    """An open page, with every message, error and request that it made."""

    def __init__(self, chromium, path, *, width=1200, height=900, **options):
        self.context = chromium.new_context(
            viewport={"width": width, "height": height}, accept_downloads=True, **options
        )
        self.page = self.context.new_page()
        self.complaints, self.requests, self.dialogs = [], [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", self._dialog)
        self.page.goto(path.as_uri())

    def _dialog(self, dialog):
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def __enter__(self):
        return self.page

    def __exit__(self, *error):
        self.context.close()

    def column(self, index):
        """Return the texts of a column of the sortable table."""
        return self.page.locator(f".sortable tbody tr > :nth-child({index + 1})").all_inner_texts()


def contrast(page, selector):
    """Return WCAG's contrast ratio of the text of each element on its ground."""
    return page.eval_on_selector_all(
        selector,
        """elements => {
          const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
          const light = (c) => {
            const [r, g, b] = parse(c).slice(0, 3).map((x) => x / 255).map(
              (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ground = (e) => {
            for (; e; e = e.parentElement) {
              const c = getComputedStyle(e).backgroundColor, p = parse(c);
              if (!(p.length === 4 && p[3] === 0)) return c;
            }
            return "rgb(255, 255, 255)";
          };
          return elements.map((e) => {
            const style = getComputedStyle(e);
            const text = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
            const [a, b] = [light(text), light(ground(e))].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
          });
        }""",
    )
