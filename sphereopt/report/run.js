"use strict";
// Sorting: a heading is a button, so that click, Enter and Space all do it.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const numeric = heading.dataset.kind === "number";
    const key = (row) => numeric ? row.cells[column].dataset.value : row.cells[column].textContent;
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => {
      // What has no number stays last, whichever way.
      if (numeric && (a === "" || b === "")) return (a === "") - (b === "");
      const order = numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
      return up ? order : -order;
    });
    body.append(...rows.map(([, row]) => row));
  }));

  // Marking: the row under the pointer, or with the focus, shows its line in every chart.
  const lines = new Map();
  for (const line of document.querySelectorAll('svg g[id*="-layer-"]')) {
    const layer = line.id.slice(line.id.lastIndexOf("-") + 1);
    lines.set(layer, [...(lines.get(layer) || []), line]);
  }
  const mark = (event, on) => {
    const row = event.target.closest("tr[data-layer]");
    if (row) (lines.get(row.dataset.layer) || []).forEach((line) => line.classList.toggle("on", on));
  };
  for (const [name, on] of [["mouseover", true], ["mouseout", false], ["focusin", true], ["focusout", false]]) {
    body.addEventListener(name, (event) => mark(event, on));
  }
  // One stop for the tab key, then arrows from row to row.
  body.addEventListener("keydown", (event) => {
    const row = event.target.closest("tr[data-layer]");
    const next = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (!row || !next || !row[next]) return;
    event.preventDefault();
    row.tabIndex = -1;
    row[next].tabIndex = 0;
    row[next].focus();
  });
}
