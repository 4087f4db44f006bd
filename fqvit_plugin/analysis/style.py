"""Style sheet and script of the HTML report; the page is complete without the script."""

from __future__ import annotations

__all__ = ['SCRIPT', 'STYLE']

# Every text colour has a contrast of at least 4.5 against its background, in light and in dark.
STYLE = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --text: #16202c; --soft: #52606f; --line: #d6dce3;
  --accent: #1f5fa8; --good: #2f7d5b; --fair: #925700; --low: #b3261e; --bar-good: #4f9d7c; --bar-fair: #d99a2b;
  --bar-low: #d5564c; --mark: #16202c; --covered: #a9c6e8; --seen: #1f5fa8; --area: #5b8fc9; }
@media (prefers-color-scheme: dark) { :root { --bg: #10151b; --card: #182029; --text: #e6ebf1; --soft: #a3b0be;
  --line: #303b47; --accent: #86b8f2; --good: #79cfa7; --fair: #efb55c; --low: #ff8f85; --bar-good: #4c9a79;
  --bar-fair: #c98f2e; --bar-low: #d1584e; --mark: #f2f5f8; --covered: #35567c; --seen: #86b8f2; --area: #5b8fc9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
header, main, footer { max-width: 1280px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 40px 0 6px; }
h3 { font-size: .92rem; margin: 0 0 8px; overflow-wrap: anywhere; font-weight: 600; }
p { margin: 0 0 12px; max-width: 78ch; }
a { color: var(--accent); }
.soft, header p, footer { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 0; padding: 0; font-size: .9rem; color: var(--soft); }
.facts div { display: flex; gap: 6px; } .facts dt, .facts dd { margin: 0; overflow-wrap: anywhere; }
.facts dt { flex: none; }
.facts dd { color: var(--text); }
nav { margin: 16px 0 0; } nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 0;
  padding: 0; }
nav a { display: inline-block; padding: 4px 0; }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); margin: 20px 0 0; }
.card, .panel, details, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 16px; } .card .label { color: var(--soft); font-size: .86rem; }
.card .figure { font-size: 1.65rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card .note { color: var(--soft); font-size: .86rem; overflow-wrap: anywhere; } .card { min-width: 0; }
.ends { display: flex; justify-content: space-between; gap: 8px; font-size: .78rem; color: var(--soft);
  margin: 2px 0 8px; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .fair { color: var(--fair); } .low { color: var(--low); }
.panels { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(270px, 100%), 1fr)); }
.panel { padding: 12px 14px; margin: 0; min-width: 0; }
.plot { display: grid; grid-template-columns: auto 1fr; gap: 2px 8px; font-size: .75rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.plot .y { display: flex; flex-direction: column; justify-content: space-between; text-align: right; min-width: 3.2em;
  line-height: 1; }
.plot .x { grid-column: 2; display: flex; justify-content: space-between; }
svg { display: block; width: 100%; height: 96px; border-bottom: 1px solid var(--line); }
svg .rule { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
svg .good { fill: var(--bar-good); } svg .fair { fill: var(--bar-fair); } svg .low { fill: var(--bar-low); }
svg .mark { fill: var(--mark); } svg .covered { fill: var(--covered); } svg .seen { fill: var(--seen); }
svg .after { fill: none; stroke: var(--mark); stroke-width: 1; vector-effect: non-scaling-stroke; }
details td svg { height: 12px; min-width: 90px; border: 0; }
.photos { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); }
.photos img { display: block; width: 100%; border-radius: 6px; } .photos figcaption { overflow-wrap: anywhere; }
svg .area { fill: var(--area); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; padding: 0; margin: 0 0 12px;
  font-size: .88rem; }
.legend span { display: inline-block; width: 14px; height: 12px; margin-right: 6px; border-radius: 2px; }
.legend .mark { height: 3px; vertical-align: 4px; background: var(--mark); }
.key-good { background: var(--bar-good); } .key-fair { background: var(--bar-fair); }
  .key-low { background: var(--bar-low); }
.key-covered { background: var(--covered); } .key-seen { background: var(--seen); }
.tools { display: flex; flex-wrap: wrap; gap: 10px 18px; align-items: end; margin: 0 0 12px; }
.tools[hidden] { display: none; }
.tools label { display: flex; flex-direction: column; font-size: .86rem; color: var(--soft); gap: 3px; }
input, select, button { font: inherit; color: var(--text); background: var(--card); border: 1px solid var(--soft);
  border-radius: 7px; padding: 6px 10px; max-width: 100%; }
button { cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.scroll { overflow: auto; max-height: 75vh; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
th, td { padding: 6px 12px; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
thead th { position: sticky; top: 0; background: var(--card); z-index: 1; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 500; }
thead button { border: 0; padding: 0; background: none; font-weight: 600; white-space: nowrap; }
th[aria-sort=ascending] button::after { content: ' \\2191'; }
  th[aria-sort=descending] button::after { content: ' \\2193'; }
tbody tr:hover, #tensors tbody tr:hover th { background: color-mix(in srgb, var(--accent) 9%, var(--card)); }
.short { max-width: 70ch; } .short th, .short td { white-space: normal; overflow-wrap: anywhere;
  vertical-align: top; }
details { margin: 0 0 8px; } summary { cursor: pointer; padding: 9px 14px; overflow-wrap: anywhere;
  font-weight: 550; }
details > .panels { padding: 4px 12px 14px; } details .panel { background: var(--bg); }
details > ul { margin: 0 0 14px; font-size: .88rem; overflow-wrap: anywhere; columns: 26rem; }
details svg { height: 74px; } figure { margin: 0; } figcaption { font-size: .82rem; color: var(--soft);
  margin: 6px 0 10px; }
.skip { position: absolute; left: -999em; } .skip:focus { left: 20px; top: 6px; background: var(--card);
  padding: 6px; }
.visually-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
footer { margin-top: 48px; padding-bottom: 32px; font-size: .86rem; }
@media (max-width: 600px) { header, main, footer { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 1.4rem; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; } .card { padding: 10px 12px; }
  .card .figure { font-size: 1.3rem; } .card:last-child:nth-child(odd) { grid-column: span 2; }
  th, td { padding: 6px 8px; } #tensors tbody th { white-space: normal; min-width: 10.5rem; }
  .tools label { width: 100%; } }
@media (min-width: 601px) { #tensors wbr { display: none; }
  #tensors tbody th, #tensors thead th:first-child { position: sticky; left: 0;
  background: var(--card); } #tensors thead th:first-child { z-index: 2; } }
@media print { :root { --bg: #fff; --card: #fff; --text: #000; --soft: #444; } body { font-size: 10pt; }
  nav, .tools, .skip { display: none; } .scroll { overflow: visible; max-height: none; border: 0; }
  .panel, .card, tr, figure { break-inside: avoid; } table { font-size: 6.5pt; } th, td { padding: 1px 3px; }
  #tensors th, #tensors td { white-space: normal; overflow-wrap: anywhere; } thead th { position: static; }
  * { print-color-adjust: exact; } }
"""

SCRIPT = """
'use strict';
(() => {
  const table = document.getElementById('tensors'), body = table.tBodies[0], tools = document.getElementById('tools');
  const rows = [...body.rows], found = document.getElementById('found');
  const text = document.getElementById('filter'), kind = document.getElementById('kind');
  const show = () => {
    const words = text.value.toLowerCase().split(/\\s+/);
    let shown = 0;
    for (const row of rows) {
      const line = row.textContent.toLowerCase();
      row.hidden = !(words.every(w => line.includes(w)) && (!kind.value || row.dataset.kind === kind.value));
      shown += !row.hidden;
    }
    found.textContent = `${shown} of ${rows.length} tensors`;
  };
  const value = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent;
  [...table.tHead.rows[0].cells].forEach((cell, i) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = cell.textContent;
    cell.replaceChildren(button);
    button.addEventListener('click', () => {
      const down = cell.getAttribute('aria-sort') === 'ascending';
      for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      cell.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const numeric = cell.classList.contains('n');
      const order = (a, b) => {
        const [x, y] = [value(a, i), value(b, i)];
        if (!numeric) return (down ? -1 : 1) * x.localeCompare(y, undefined, {numeric: true});
        if (x === '' || y === '') return (x === '') - (y === '');
        return (down ? -1 : 1) * (Number(x) - Number(y));
      };
      body.append(...rows.sort(order));
    });
  });
  text.addEventListener('input', show);
  kind.addEventListener('change', show);
  document.getElementById('open').addEventListener('click', event => {
    const all = [...document.querySelectorAll('#histograms details')], open = all.some(d => !d.open);
    for (const d of all) d.open = open;
    event.target.textContent = open ? 'Close all' : 'Open all';
  });
  tools.hidden = false;
  document.getElementById('opener').hidden = false;
  show();
})();
"""
