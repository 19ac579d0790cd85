"""The report's HTML: escaping, cards, tables, style sheet and the few lines of script around the figures."""

import html
from collections.abc import Iterable, Sequence

from plotly.offline import get_plotlyjs

# The policy lets the browser fetch nothing: whatever text a run holds, the page stays offline.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

# Plotly measures its card while the page still loads: nothing that comes later (a scroll bar, a neighbour) may
# change a card's width.
STYLE = """
html { overflow-y: scroll; }
:root { color-scheme: light dark; --paper: #f6f6f4; --card: #fff; --ink: #1d2129; --soft: #5b626d;
  --line: #e1e2e4; --grid: #ececee; --accent: #3f78d8; --note: #fdf3dc; --note-ink: #6a4a08; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1c1f25; --ink: #e8eaee; --soft: #a0a7b2;
  --line: #2e323a; --grid: #2a2e36; --note: #3a2f14; --note-ink: #f1d493; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -0.015em; }
h1 span { font-weight: 400; color: var(--soft); }
h2 { font-size: 21px; line-height: 1.3; margin: 48px 0 4px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 0 0 4px; } h3 small { font-weight: 400; font-size: 13px; color: var(--soft); }
p, figcaption { text-wrap: pretty; } p { margin: 0 0 12px; max-width: 90ch; } .soft, figcaption { color: var(--soft); }
header p { margin: 6px 0 0; max-width: none; } .hint { font-size: 14px; max-width: none; }
@media (pointer: coarse) { .mouse { display: none; } }
 code { font: 13px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.progress { height: 6px; border-radius: 3px; background: var(--line); margin: 16px 0; overflow: hidden; }
.progress div { height: 100%; background: var(--accent); }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin: 16px 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span, .tile small { display: block; font-size: 13px; line-height: 1.4; color: var(--soft); }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(2, minmax(0, 1fr)); margin-top: 14px; }
.card { margin: 0; min-width: 0; } .wide { grid-column: 1 / -1; }
figcaption { margin-top: 6px; font-size: 14px; line-height: 1.45; max-width: 96ch; }
.note { background: var(--note); color: var(--note-ink); border-radius: 8px; padding: 10px 14px; font-size: 14px;
  margin: 10px 0 0; max-width: none; }
.legend { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin: 10px 0 0; font-size: 13px;
  color: var(--soft); }
.scale { flex: 0 1 180px; height: 9px; border-radius: 3px; }
.chip { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 999px; padding: 3px 10px; display: inline-flex; gap: 6px; align-items: center; }
button.chip { cursor: pointer; } .legend.chosen button.chip[aria-pressed=false] { opacity: 0.45; }
.chip i, td i { width: 9px; height: 9px; border-radius: 50%; display: inline-block; flex: none; }
.scroll { overflow: auto; max-height: 560px; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
tbody tr:last-child td { border-bottom: 0; } .number { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { width: 38%; } td.bar div { height: 10px; border-radius: 3px; min-width: 2px; }
tr.changed td { font-weight: 600; } summary { cursor: pointer; font-weight: 600; } details table { margin-top: 10px; }
.js-plotly-plot .main-svg > g:not(.hoverlayer) text { fill: var(--soft) !important; }
.js-plotly-plot .gridlayer path { stroke: var(--grid) !important; }
@media (max-width: 720px) { main { padding: 24px 14px 48px; } h1 { font-size: 25px; } .optional { display: none; }
  .grid { grid-template-columns: minmax(0, 1fr); } .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tile { padding: 11px 12px; } .tile b { font-size: 20px; } .card { padding: 12px; } td.bar { width: 26%; } }
"""

# A chip isolates its layer or domain in every figure of its section; on touch screens a swipe scrolls.
_SCRIPT = """
if (matchMedia("(pointer: coarse)").matches)
  document.querySelectorAll(".js-plotly-plot").forEach(figure => Plotly.relayout(figure, {dragmode: false}));
document.addEventListener("click", event => {
  const chip = event.target.closest("button.chip");
  if (!chip) return;
  const section = chip.closest("section"), isolate = chip.getAttribute("aria-pressed") !== "true";
  chip.parentElement.classList.toggle("chosen", isolate);
  section.querySelectorAll("button.chip").forEach(c => c.setAttribute("aria-pressed", isolate && c === chip));
  section.querySelectorAll(".js-plotly-plot").forEach(figure => Plotly.restyle(figure,
    {visible: figure.data.map(trace => !isolate || !trace.meta || trace.meta === chip.dataset.key)}));
});
"""


def escape(text: object) -> str:
    """Any value as text that HTML shows literally."""
    return html.escape(str(text))


def tile(value: str, label: str, detail: str = "") -> str:
    """A key number."""
    small = f"<small>{escape(detail)}</small>" if detail else ""
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span>{small}</div>'


def card(title: str, body: str, caption: str, *, unit: str = "", wide: bool = False, note: str = "") -> str:
    """A figure with its title and a sentence that helps to read it; `body` is HTML, all else text."""
    small = f" <small>{escape(unit)}</small>" if unit else ""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="card{" wide" if wide else ""}"><h3>{escape(title)}{small}</h3>{body}'
        f"<figcaption>{escape(caption)}</figcaption>{note}</figure>\n"
    )


def legend(label: str, chips: Sequence[tuple[str, str, str]], *, clickable: bool = True, note: str = "") -> str:
    """Chips of (key, text, colour), which isolate their curves when clicked."""
    parts = []
    for key, text, colour in chips:
        dot = f'<i style="background:{colour}"></i>{escape(text)}'
        if clickable and len(chips) > 1:
            parts.append(f'<button class="chip" data-key="{escape(key)}" aria-pressed="false">{dot}</button>')
        else:
            parts.append(f'<span class="chip">{dot}</span>')
    return f'<div class="legend">{escape(label)} {"".join(parts)} {escape(note)}</div>'


def colour_scale(low: str, high: str, colours: Sequence[tuple[float, str]]) -> str:
    """A gradient between two labels."""
    stops = ", ".join(f"{colour} {share:.0%}" for share, colour in colours)
    gradient = f'<i class="scale" style="background:linear-gradient(90deg, {stops})"></i>'
    return f'<div class="legend">{escape(low)} {gradient} {escape(high)}</div>'


def section(title: str, lead: str, cards: Iterable[str], legend_html: str = "") -> str:
    """A heading, what it is about, and its cards."""
    return (
        f'<section><h2>{escape(title)}</h2><p class="soft">{escape(lead)}</p>{legend_html}'
        f'<div class="grid">{"".join(cards)}</div></section>\n'
    )


def note(text: str) -> str:
    """A highlighted paragraph."""
    return f'<p class="note">{escape(text)}</p>'


# A page in view reloads every minute, but not under a hand: scrolling, hovering and clicking put it off.
_REFRESH = """
let touched = 0;
["scroll", "pointermove", "keydown"].forEach(kind => addEventListener(kind, () => { touched = Date.now(); }));
setInterval(() => { if (!document.hidden && Date.now() - touched > 60000) location.reload(); }, 60000);
"""


def page(title: str, body: str, refresh: bool = False) -> str:
    """The whole document; `body` is HTML. With `refresh` it renews itself while nobody is at it."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script></head>\n"
        f"<body><main>{body}</main>\n<script>{_SCRIPT}{_REFRESH if refresh else ''}</script></body></html>\n"
    )
