"""The style sheet of the page: light, dark, narrow and printed."""

from __future__ import annotations

from scaling_ldm.report import plotting

_CSS = """
:root { color-scheme: light dark; --ink: #1c2127; --paper: #fefefe; --soft: #5d6470;
  --rule: #d9dbe0; --fill: #f3f4f6; --alarm: #a3261a; --tint: #fdf1ef; LIGHT }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e6ea;
  --paper: #14171b; --soft: #9aa1ac; --rule: #3a4048; --fill: #1d2126;
  --alarm: #ff8f80; --tint: #2c1c1a; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1120px; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; border-top: 1px solid var(--rule);
  padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { max-width: 72ch; margin: .5rem 0; overflow-wrap: anywhere; }
.caption { color: var(--soft); font-size: .85rem; margin: 1rem 0 .2rem; }
.question { color: var(--soft); font-size: 1.05rem; margin: 0 0 1rem; }
.headline { font-size: 1.12rem; padding: .8rem 1rem;
  background: var(--fill); border-left: 4px solid var(--soft); margin: 1rem 0; }
.headline p { max-width: none; margin: .2rem 0; }
.headline .group { font-weight: 600; margin-top: .8rem; }
.headline .group:first-child { margin-top: 0; }
.law, .whole { white-space: nowrap; }
.law { font-weight: 600; }
.alarm { background: var(--tint); border-left: 4px solid var(--alarm);
  padding: .5rem 1rem; margin: .8rem 0; }
.bad { color: var(--alarm); font-weight: 600; }
.soft { color: var(--soft); }
dl.facts { display: grid; gap: .4rem 1.4rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
dl.facts dt { color: var(--soft); font-size: .8rem; }
dl.facts code { font-size: .8rem; }
dl.facts dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .85rem; max-width: 80ch; }
.three { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
.scroll { overflow-x: auto; max-width: 100%; }
.plot svg { min-width: min(400px, var(--own)); }
.wide svg { min-width: min(640px, var(--own)); }
table { border-collapse: collapse; font-size: .8rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .22rem .55rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal;
  min-width: 3.2rem; }
th.words, td.words { text-align: left; }
td.long { white-space: normal; min-width: 14rem; max-width: 30rem;
  overflow-wrap: anywhere; }
tfoot td { font-weight: 600; border-top: 2px solid var(--soft); }
.grid { display: grid; gap: .8rem; margin: 1rem 0; }
.grid figure { margin: 0; }
.grid img { display: block; width: 100%; height: auto; image-rendering: pixelated; }
.pair { display: grid; gap: 3px; grid-template-columns: 1fr 1fr; }
.grid figcaption { font-size: .7rem; line-height: 1.25; padding-top: .2rem;
  overflow-wrap: break-word; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--fill); padding: .8rem 1rem; overflow-x: auto;
  font: .8rem/1.45 ui-monospace, monospace; }
@page { size: A4; margin: 14mm; }
@media print { body { padding: 0; font-size: 10pt; max-width: none; }
  details::details-content { content-visibility: visible; height: auto; }
  .scroll { overflow: visible; } .plot svg, .wide svg { min-width: 0; }
  table { font-size: 6.5pt; } th, td { padding: .1rem .25rem; }
  th { min-width: 0; } td.long { min-width: 9rem; }
  figure, tr, .headline { break-inside: avoid; } h2, h3 { break-after: avoid; }
  pre { white-space: pre-wrap; font-size: 7pt; } }
"""


def sheet(body: str) -> str:
    """The style sheet, with the colours that the page's figures use."""
    used = [c for c in plotting.DARK if plotting.variable(c) in body]
    light = " ".join(f"{plotting.variable(c)}: {c};" for c in used)
    dark = " ".join(f"{plotting.variable(c)}: {plotting.DARK[c]};" for c in used)
    return _CSS.replace("LIGHT", light).replace("DARK", dark)
