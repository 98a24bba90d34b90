"""The style sheet of a sweep's page."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1c1f26; --quiet: #626a78; --line: #dfe3ea; --panel: #f5f6f9; --link: #0b5cad;
  --finished: #0072b2; --stopped: #d98e00; --failed: #c4420a; --running: #009e73; --best: #14171d;
  --rank-low: #ccd7e4; --rank-middle: #6f9fce; --rank-high: #08376b; --grid: #e6e9ef;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --ink: #e7eaf0; --quiet: #9aa3b2; --line: #2d333d; --panel: #1d2129; --link: #74b3f2;
    --finished: #56b4e9; --stopped: #f0b13c; --failed: #ff8552; --running: #2fc79b; --best: #ffffff;
    --rank-low: #38424f; --rank-middle: #4f86c0; --rank-high: #d3e8ff; --grid: #2a2f38;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; line-height: 1.3; margin: 44px 0 4px; overflow-wrap: anywhere; }
p { margin: 4px 0 12px; max-width: 80ch; overflow-wrap: anywhere; }
p.quiet, .quiet { color: var(--quiet); font-size: 14px; }
a { color: var(--link); }
ul.notes { margin: 8px 0 0; padding-left: 20px; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0 8px; padding: 0; list-style: none; }
.facts li { background: var(--panel); border-radius: 8px; padding: 8px 14px; min-width: 104px; max-width: 100%;
  color: var(--quiet); font-size: 13px; overflow-wrap: anywhere; }
.facts b { display: block; color: var(--ink); font-size: 20px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.going { border-left: 4px solid var(--running); background: var(--panel); padding: 8px 14px; margin: 14px 0;
  border-radius: 0 8px 8px 0; }
.going progress { width: 100%; height: 8px; accent-color: var(--running); display: block; margin-top: 6px; }
.scroll { overflow: auto; max-height: 840px; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; z-index: 1; background: var(--panel); border-bottom: 1px solid var(--line); padding: 0;
  text-align: left; vertical-align: bottom; }
th button { all: unset; box-sizing: border-box; width: 100%; padding: 7px 10px; cursor: pointer; font-weight: 600;
  max-width: 190px; overflow-wrap: break-word; min-width: 62px; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: -2px; }
th button::after { content: "\\2195"; color: var(--quiet); opacity: 0.45; padding-left: 4px; font-weight: 400; }
th[aria-sort="ascending"] button::after { content: "\\2191"; opacity: 1; color: var(--link); }
th[aria-sort="descending"] button::after { content: "\\2193"; opacity: 1; color: var(--link); }
td { padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); }
th:first-child { z-index: 2; background: var(--panel); }
tbody tr:last-child td { border-bottom: 0; }
tbody tr:hover td { background: var(--panel); }
tr.best td { background: color-mix(in srgb, var(--finished) 13%, var(--page)); }
tr.best b { font-size: 11px; padding: 1px 6px; border-radius: 9px; background: var(--best); color: var(--page); }
th.number, td.number { text-align: right; }
.error { white-space: normal; min-width: 150px; max-width: 260px; max-height: 9em; overflow: auto;
  color: var(--failed); font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px;
  background: var(--quiet); }
.dot.finished { background: var(--finished); } .dot.stopped-early { background: var(--stopped); border-radius: 1px; }
.dot.failed { background: var(--failed); transform: rotate(45deg) scale(0.9); border-radius: 1px; }
.dot.running { background: var(--running); } .dot.waiting { background: none; border: 2px solid var(--quiet); }
div + .scroll { margin-top: 14px; }
.wide { overflow-x: auto; }
.early { background: var(--panel); border-radius: 8px; padding: 10px 14px; color: var(--quiet); }
.switch { display: inline-flex; border: 1px solid var(--line); border-radius: 7px; overflow: hidden;
  margin: 2px 0 4px; }
.switch button { border: 0; background: none; color: var(--ink); font: inherit; font-size: 13px; padding: 4px 13px;
  cursor: pointer; }
.switch button[aria-pressed="true"] { background: var(--finished); color: var(--page); }
.preset { position: relative; }
.preset pre { background: var(--panel); border-radius: 8px; padding: 14px 16px; margin: 0; overflow: auto;
  max-height: 640px; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.preset button { position: absolute; top: 10px; right: 14px; font: inherit; font-size: 13px; padding: 4px 14px;
  border: 1px solid var(--line); border-radius: 7px; background: var(--page); color: var(--ink); cursor: pointer; }
@media (max-width: 640px) { .preset button { position: static; margin-bottom: 8px; } }
.parcoords .axis path.domain { stroke: var(--quiet) !important; stroke-opacity: 1 !important; }
noscript p { border-left: 4px solid var(--failed); padding-left: 12px; }
"""
