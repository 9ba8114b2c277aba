"""One self-contained HTML page: text, sortable tables and embedded figures; no network, no libraries."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

STYLE = """
:root { --ink: #22262c; --soft: #5d6570; --rule: #e1e5ea; --back: #f6f7f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 0 0 .7rem; }
p { margin: .4rem 0 .8rem; max-width: 52rem; }
.soft { color: var(--soft); }
nav { margin: 1rem 0 1.4rem; display: flex; flex-wrap: wrap; gap: .4rem .5rem; }
nav a { color: var(--accent); background: white; border: 1px solid var(--rule); border-radius: 99px; padding: .1rem .75rem;
  text-decoration: none; font-size: .88rem; }
section { background: white; border: 1px solid var(--rule); border-radius: 10px; padding: 1.2rem 1.3rem; margin: 0 0 1.1rem; }
ul { margin: .2rem 0 .9rem; padding-left: 1.2rem; }
li { margin: .2rem 0; }
figure { margin: .6rem 0 .2rem; }
figure + figure { margin-top: 1.8rem; }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { color: var(--soft); font-size: .87rem; max-width: 54rem; }
.scroll { overflow-x: auto; max-height: 34rem; overflow-y: auto; border: 1px solid var(--rule); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #eef1f4; text-align: left; padding: .4rem .65rem; cursor: pointer;
  user-select: none; white-space: nowrap; font-weight: 600; }
th[data-way="1"]::after { content: " \\25B4"; } th[data-way="-1"]::after { content: " \\25BE"; }
td { padding: .3rem .65rem; border-top: 1px solid var(--rule); white-space: nowrap; }
td.wide { white-space: normal; min-width: 14rem; }
td.number, th.number { text-align: right; }
tbody tr:hover { background: #f4f8fb; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
code, pre { font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, monospace; }
pre { background: var(--back); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; }
@media print { section { break-inside: avoid; border: 0; } .scroll { max-height: none; } nav { display: none; } }
"""

SCRIPT = """
for (const head of document.querySelectorAll('th')) head.onclick = () => {
  const body = head.closest('table').tBodies[0], at = head.cellIndex, way = head.dataset.way === '1' ? -1 : 1;
  const value = row => { const c = row.cells[at], n = parseFloat(c.dataset.value); return isNaN(n) ? c.textContent : n; };
  const empty = v => v === '' || v === '\\u2013';
  const order = (p, q) => { const a = value(p), b = value(q);
    if (empty(a) || empty(b)) return empty(a) - empty(b);
    return way * (typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b))); };
  for (const other of head.parentNode.cells) delete other.dataset.way;
  head.dataset.way = way;
  [...body.rows].sort(order).forEach(row => body.append(row));
};
"""


@dataclass
class Page:
    """A page, written from top to bottom.

    Attributes:
        title, subtitle: plain text.
        sections: pairs (heading, HTML).
    """

    title: str
    subtitle: str
    sections: list[tuple[str, str]] = field(default_factory=list)

    def add(self, heading: str, *parts: str) -> None:
        self.sections.append((heading, "\n".join(parts)))

    def html(self) -> str:
        links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(self.sections))
        body = "\n".join(f'<section id="s{i}"><h2>{escape(name)}</h2>\n{content}\n</section>'
                         for i, (name, content) in enumerate(self.sections))  # fmt: skip
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width">\n<title>{escape(self.title)}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(self.title)}</h1>\n"
            f'<p class="soft">{escape(self.subtitle)}</p>\n<nav>{links}</nav>\n{body}\n</main>\n'
            f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )


def text(line: str) -> str:
    """A paragraph."""
    return f"<p>{escape(line)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def code(lines: str) -> str:
    """Preformatted lines in a box."""
    return f"<pre>{escape(lines)}</pre>"


def folded(heading: str, *parts: str) -> str:
    """Parts that a click unfolds."""
    return f"<details><summary>{escape(heading)}</summary>\n{''.join(parts)}\n</details>"


def picture(file: Path, caption: str) -> str:
    """A figure's PNG file, embedded at 100 pixels per inch, with a caption."""
    with Image.open(file) as image:
        width = round(100 * image.width / image.info["dpi"][0])
    data = base64.b64encode(file.read_bytes()).decode()
    return (f'<figure><img width="{width}" alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>")  # fmt: skip


def table(frame: pd.DataFrame, names: Mapping[str, str] | None = None, note: str = "") -> str:
    """A table below a note; a click on a column's head sorts it; missing values are dashes."""
    names = names or {}
    numbers = {c: pd.api.types.is_numeric_dtype(frame[c]) for c in frame}
    head = "".join(f"<th{_class(numbers[c])}>{escape(names.get(str(c), str(c).replace('_', ' ')))}</th>" for c in frame)
    rows = ("".join(_cell(value, numbers[c]) for c, value in row.items()) for _, row in frame.astype(object).iterrows())
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    above = f'<p class="soft">{escape(note)}</p>\n' if note else ""
    return f'{above}<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _class(number: bool) -> str:
    return ' class="number"' if number else ""


def _cell(value: Any, number: bool) -> str:
    if pd.isna(value):
        return f"<td{_class(number)}>–</td>"
    if number:
        exact = repr(float(value)).replace("inf", "Infinity")  # as JavaScript reads it
        return f'<td class="number" data-value="{exact}">{_short(float(value))}</td>'
    wide = ' class="wide"' if len(str(value)) > 40 else ""
    return f"<td{wide}>{escape(str(value))}</td>"


def _short(value: float) -> str:
    whole = value.is_integer() or abs(value) >= 1000
    return f"{value:,.0f}" if whole and abs(value) < 1e6 else f"{value:.3g}".replace("inf", "∞")
