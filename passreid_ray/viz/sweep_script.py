"""The script of a sweep's page: sorting, pictures in the colours of the style sheet, switches, the copy button."""

SCRIPT = r"""
"use strict";

function sortTable(table, head) {
  const column = head.cellIndex;
  const ascending = head.getAttribute("aria-sort") !== "ascending";
  const isNumber = head.dataset.kind === "number";
  const rows = Array.from(table.tBodies[0].rows, (row) => ({ row, key: row.cells[column].dataset.key }));
  rows.sort((one, other) => {
    if (one.key === "" || other.key === "") return (one.key === "") - (other.key === "");   // missing: always last
    const order = isNumber ? one.key - other.key : one.key.localeCompare(other.key, "en", { numeric: true });
    return ascending ? order : -order;
  });
  for (const cell of table.tHead.rows[0].cells) cell.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  table.tBodies[0].append(...rows.map((entry) => entry.row));
}

for (const table of document.querySelectorAll("table")) {
  for (const head of table.tHead.rows[0].cells) {
    head.querySelector("button").addEventListener("click", () => sortTable(table, head));
  }
}

const copyButton = document.getElementById("copy");
if (copyButton) copyButton.addEventListener("click", async () => {
  const preset = document.getElementById("preset");
  try {
    await navigator.clipboard.writeText(preset.textContent);
  } catch {   // a page over plain http has no clipboard, but may copy what is selected
    window.getSelection().selectAllChildren(preset);
    document.execCommand("copy");
  }
  copyButton.textContent = "copied";
  setTimeout(() => { copyButton.textContent = "copy"; }, 1500);
});

// Colours are names of the style sheet, and {runs: [[value, how often], ...]} is a list written short.
function written(value, style) {
  if (typeof value === "string") {
    const name = /^var\((--[a-z-]+)\)$/.exec(value);
    return name ? style.getPropertyValue(name[1]).trim() : value;
  }
  if (Array.isArray(value)) return value.map((item) => written(item, style));
  if (value === null || typeof value !== "object") return value;
  if (value.runs) return value.runs.flatMap(([item, count]) => Array(count).fill(item));
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, written(item, style)]));
}

function themed(figure, style) {
  const colour = (name) => style.getPropertyValue(name).trim();
  const data = written(figure.data, style);
  const layout = written(figure.layout, style);
  layout.paper_bgcolor = layout.plot_bgcolor = colour("--page");
  layout.font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") };
  layout.hoverlabel = { align: "left", bgcolor: colour("--panel"), bordercolor: colour("--line"),
                        font: { color: colour("--ink") } };
  layout.autosize = true;
  for (const axis of [layout.xaxis, layout.yaxis]) {
    if (axis) Object.assign(axis, { gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false,
                                    automargin: true, exponentformat: "power" });
  }
  for (const trace of data) {
    if (trace.type !== "parcoords") continue;
    trace.labelfont = { color: colour("--ink"), size: 13 };
    trace.tickfont = { color: colour("--ink"), size: 11 };
    trace.rangefont = { color: "rgba(0,0,0,0)", size: 1 };   // the ends are positions, not values
    trace.unselected = { line: { color: colour("--quiet"), opacity: 0.06 } };
  }
  return { data, layout };
}

const figures = JSON.parse(document.getElementById("figures").textContent);
const chosen = {};

function draw(id) {
  const { data, layout } = themed(figures[id], getComputedStyle(document.documentElement));
  const change = figures[id].switches[chosen[id]];
  if (change) {
    data.forEach((trace, number) => { trace.x = change.x[number]; });
    layout.xaxis.title = { text: change.title };
  }
  return Plotly.react(document.getElementById(id), data, layout, {
    responsive: true, displayModeBar: false,
  });
}

for (const group of document.querySelectorAll(".switch")) {
  for (const button of group.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      chosen[group.dataset.figure] = button.value;
      for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
      draw(group.dataset.figure);
    });
  }
}

const drawAll = () => Promise.all(Object.keys(figures).map(draw));
drawAll().then(() => { document.documentElement.dataset.drawn = "yes"; });
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
"""
