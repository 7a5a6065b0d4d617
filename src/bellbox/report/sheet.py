"""The page's style sheet: two colour schemes, one for paper, no file or font from elsewhere; pictures by themselves."""

from __future__ import annotations

from dataclasses import dataclass

from bellbox.report.style import FONT

_LIGHT = """
--paper:#ffffff; --panel:#f6f7f9; --line:#dfe3e8; --ink:#1a2027; --muted:#5c6773; --grid:#e8ebef;
--blue:#0072b2; --orange:#c97700; --green:#00805f; --red:#c24a00; --purple:#a8527f;
"""
_DARK = """
--paper:#14181d; --panel:#1c2228; --line:#323a43; --ink:#e4e8ec; --muted:#9aa5b1; --grid:#2a3139;
--blue:#58b0e6; --orange:#f0b13c; --green:#2fc79a; --red:#f0803c; --purple:#d98fb8;
"""
STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 {FONT}; }}
main {{ max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }}
.kicker {{ margin: 0; color: var(--muted); font-size: .8rem; letter-spacing: .09em; text-transform: uppercase; }}
h1 {{ margin: .1rem 0 .3rem; font-size: 2.1rem; line-height: 1.15; overflow-wrap: anywhere; }}
h2 {{ margin: 2.8rem 0 .9rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); font-size: 1.25rem; }}
.about {{ margin: 0 0 1.6rem; color: var(--muted); overflow-wrap: anywhere; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; }}
.card {{ padding: .85rem 1rem; background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; }}
.card .label {{ color: var(--muted); font-size: .8rem; }}
.card .value {{ font-size: 1.65rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }}
.card .note {{ color: var(--muted); font-size: .8rem; line-height: 1.35; }}
figure {{ margin: 0 0 1.9rem; break-inside: avoid; }}
figure svg {{ display: block; width: 100%; height: auto; }}
figcaption, .caption {{ margin: .5rem 0 0; max-width: 54rem; color: var(--muted); font-size: .9rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left; }}
thead th {{ color: var(--muted); font-weight: 500; }}
tbody th {{ font-weight: 550; }}
.sizes {{ width: 100%; }}
.sizes td:not(.wide), .sizes thead th:not(:first-child):not(.wide) {{ text-align: right; white-space: nowrap; }}
.sizes th {{ white-space: nowrap; }}
.wide {{ min-width: 9rem; width: 24%; padding-left: .6rem; }}
.bar {{ display: block; height: .55rem; margin: .12rem 0; border-radius: .15rem; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }}
.before {{ background: var(--muted); opacity: .55; }}
.after {{ background: var(--blue); }}
.facts th {{ width: 9rem; vertical-align: top; color: var(--muted); font-weight: 500; }}
.facts td {{ overflow-wrap: anywhere; }}
blockquote {{ margin: 0; padding: 1rem 1.25rem; background: var(--panel); border-left: 3px solid var(--blue);
  border-radius: 0 .5rem .5rem 0; font-family: Georgia, 'Times New Roman', serif; font-size: 1.05rem; }}
details {{ margin: .6rem 0; }}
summary {{ cursor: pointer; font-weight: 550; margin-bottom: .4rem; }}
pre {{ margin: 0; padding: .9rem 1rem; overflow-x: auto; background: var(--panel); border: 1px solid var(--line);
  border-radius: .5rem; font: .82rem/1.5 ui-monospace, 'SF Mono', Menlo, Consolas, monospace; }}
@media print {{
  :root {{ color-scheme: light; {_LIGHT} }}
  body {{ font-size: 10.5pt; }}
  main {{ max-width: none; padding: 0; }}
  h2 {{ break-after: avoid; }}
  .card, blockquote, tr {{ break-inside: avoid; }}
  .card {{ padding: .6rem .7rem; }}
  .card .value {{ font-size: 1.3rem; }}
  pre {{ white-space: pre-wrap; }}
}}
"""


def standalone(svg: str) -> str:
    """A picture of the page as a file of its own: it brings the colours, light or dark as the reader has it."""
    scheme = f"svg {{ {_LIGHT} }}\n@media (prefers-color-scheme: dark) {{ svg {{ {_DARK} }} }}"
    opening, rest = svg.split(">", 1)
    opening = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{opening}>\n<style>{scheme}</style>{rest}\n"


@dataclass(frozen=True)
class Picture:
    """One picture of a study."""

    name: str
    """For its file."""
    caption: str
    svg: str
    """For a page that brings the colours."""

    @property
    def standalone(self) -> str:
        """For a file of its own."""
        return standalone(self.svg)
