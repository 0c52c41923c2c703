"""How the page looks."""

from typing import Final

STYLE: Final = """
:root {
  --ink: #1f2328;
  --faint: #656d76;
  --line: #d8dee4;
  --card: #f6f8fa;
  --blue: #3b76b5;
  --bad: #b3261e;
}
* { box-sizing: border-box; }
body {
  margin: 0;
  background: #fff;
  color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Arial, sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 18px; margin: 36px 0 12px; border-bottom: 1px solid var(--line); }
p.sub, em { color: var(--faint); font-style: normal; font-size: 13px; }
.cards {
  display: grid;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: 12px;
  margin-top: 18px;
}
.card {
  background: var(--card);
  border: 1px solid var(--line);
  border-radius: 8px;
  padding: 12px 14px;
}
.card b { display: block; font-size: 23px; font-variant-numeric: tabular-nums; }
.card span { color: var(--faint); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 16px; }
svg { width: 100%; border: 1px solid var(--line); border-radius: 8px; padding: 6px; }
.bar { fill: var(--blue); }
.axis { stroke: var(--line); }
.limit { stroke: var(--bad); stroke-dasharray: 4 3; }
.tick, .label { font: 11px system-ui, sans-serif; fill: var(--faint); }
.limit-text { font: 600 11px system-ui, sans-serif; fill: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 5px 14px 5px 0; }
td, th { text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
details.pack summary { display: flex; gap: 12px; align-items: center; cursor: pointer; padding: 3px 0; }
details.pack summary b { width: 56px; text-align: right; }
details.pack summary em { width: 330px; }
.track {
  flex: 1;
  display: flex;
  height: 20px;
  background: #ececec;
  border-radius: 3px;
  overflow: hidden;
}
.track i { display: block; height: 100%; border-right: 1px solid #fff; }
details.pack section {
  margin: 8px 0 14px 68px;
  border-left: 3px solid var(--line);
  padding-left: 12px;
}
h4 { margin: 0 0 4px; font-size: 14px; }
h4 i { display: inline-block; width: 11px; height: 11px; margin-right: 7px; }
h4 em { margin-left: 10px; font-weight: 400; }
.tiles img { margin: 2px; border-radius: 3px; vertical-align: middle; }
section p { margin: 6px 0 0; font: 13px/1.5 ui-monospace, Menlo, monospace; overflow-wrap: anywhere; }
mark { background: #d7f0d8; border-radius: 2px; }
"""
