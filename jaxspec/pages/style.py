"""The style of all pages: light and dark, phone to desktop, and print."""

from __future__ import annotations

COLOURS = 6
"""Colours of series, `.c0` and so on: pairs that the colour-blind tell apart, in light and in dark."""

STYLE = (
    """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f5f7fa; --ink: #1b1f24; --soft: #525c68; --line: #d4dae1; --link: #0b5cad;
  --heat: #2f80d8; --c0: #0b62b0; --c1: #b84f00; --c2: #00795c; --c3: #a0307f; --c4: #5b4bb5; --c5: #756000;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1c2127; --ink: #e8ebef; --soft: #a9b3be; --line: #3a424c; --link: #7ab8ff;
    --heat: #3d8fe6; --c0: #62adff; --c1: #ff9c54; --c2: #3fcf9f; --c3: #f08fd0; --c4: #b3a6ff; --c5: #d9bf3f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; font-size: 1rem; }
header, main, footer { max-width: 80rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1.6rem 0 .5rem; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 2.6rem 0 .4rem; padding-top: .7rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p, .answers { max-width: 46rem; }
p { margin: .4rem 0; }
a { color: var(--link); }
code, pre { font-family: ui-monospace, "SF Mono", Consolas, "Liberation Mono", monospace; font-size: .88em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem .7rem; margin: .4rem 0; }
nav ul { list-style: none; padding: 0; margin: .8rem 0; display: flex; flex-wrap: wrap; gap: .3rem .9rem; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: .5rem; top: .5rem; background: var(--paper); padding: .3rem .6rem; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.soft { color: var(--soft); font-size: .9rem; }
.answers li { margin: .25rem 0; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr));
  align-items: start; margin: .8rem 0; }
figure { margin: 0; padding: .7rem; background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  min-width: 0; max-width: 34rem; }
figure.wide { max-width: none; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .2rem; }
figure p { font-size: .85rem; color: var(--soft); }
figure svg.plot { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; max-width: 100%; }
.legend { list-style: none; margin: .1rem 0 .3rem; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem .9rem;
  font-size: .82rem; }
.legend li { display: flex; min-width: 0; align-items: center; gap: .35rem; }
.legend svg { flex: none; width: 30px; height: 14px; }
details { margin: .45rem 0; }
summary { cursor: pointer; font-size: .85rem; color: var(--link); width: fit-content; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
th { font-weight: 600; }
tbody th { font-weight: 400; }
td.number, th.number { text-align: right; white-space: nowrap; }
td { white-space: nowrap; }
td.long { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
tbody th { min-width: 5rem; }
dl { display: grid; grid-template-columns: fit-content(14rem) minmax(0, 1fr); gap: .2rem .9rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; }
footer { margin-top: 3rem; padding-bottom: 2rem; font-size: .85rem; color: var(--soft); }

svg text { fill: var(--ink); font-size: 11px; font-family: system-ui, -apple-system, "Segoe UI", Roboto,
  "Noto Sans", sans-serif; }
svg .tick { fill: var(--soft); font-size: 10.5px; }
svg .small { font-size: 10.5px; }
svg .axis { stroke: var(--soft); stroke-width: 1; fill: none; }
svg .rule { stroke: var(--line); stroke-width: 1; fill: none; }
svg .reference { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 2 3; fill: none; }
svg .halo { paint-order: stroke; stroke: var(--panel); stroke-width: 3px; stroke-linejoin: round; }
svg .strong { font-weight: 700; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .band { stroke: none; fill-opacity: .16; }
svg .whisker { fill: none; stroke-width: 1.3; }
svg .mark { stroke: var(--panel); stroke-width: .6; }
svg .ring { fill: none; stroke: var(--ink); stroke-width: 1.6; }
svg .heat { fill: var(--heat); }
svg .cell { stroke: var(--line); stroke-width: .8; fill: none; }
svg .edge { stroke: var(--c0); fill: none; stroke-opacity: .55; stroke-linecap: round; }
"""
    + "\n".join(
        f"svg .c{i} {{ --c: var(--c{i}); }} svg .c{i}.line, svg .c{i}.whisker {{ stroke: var(--c{i}); }} "
        f"svg .c{i}.mark, svg .c{i}.band {{ fill: var(--c{i}); }}"
        for i in range(COLOURS)
    )
    + """
@media print {
  body { font-size: 10pt; }
  nav, .skip { display: none; }
  figure, tr { break-inside: avoid; }
  h2, h3, figcaption { break-after: avoid; }
  .scroll { overflow: visible; }
  td { white-space: normal; }
  table { font-size: .75rem; }
}
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
"""
)
