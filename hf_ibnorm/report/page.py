"""The one HTML page: a single file that can be mailed, archived and read without a network or a script."""

import base64
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from .plots import WIDTH
from .tables import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f21; --paper: #ffffff; --faint: #6b7075; --line: #d9dcdf;
  --good: #00704f; --bad: #b04a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --paper: #17191b; --faint: #9aa0a6; --line: #3a3e42;
  --good: #4cc79b; --bad: #f0955a; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: PAGE_WIDTH;
  margin: 2.5rem auto; padding: 0 1.25rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin-bottom: .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p.lead { color: var(--faint); margin-top: 0; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .8rem; overflow-wrap: break-word; }
th, td { padding: .3rem .4rem; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
td.text ~ td.text ~ td.text { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
th { font-weight: 600; border-bottom: 2px solid var(--line); vertical-align: bottom; max-width: 12rem; }
.text { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
/* Scrolled sideways, a row keeps its name, where there is room for both. */
@media (min-width: 48rem) { th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); } }
td.good { color: var(--good); font-weight: 600; } td.bad { color: var(--bad); font-weight: 600; }
img { display: block; width: PAGE_WIDTH; max-width: 100%; background: #ffffff; border-radius: 4px; }
details { margin: .5rem 0; } summary { cursor: pointer; }
footer { color: var(--faint); font-size: .85rem; margin-top: 3rem; border-top: 1px solid var(--line);
  padding-top: .75rem; }
code { font-size: .85em; }
""".replace("PAGE_WIDTH", f"{WIDTH:g}in")


@dataclass
class Page:
    """A page that is filled from top to bottom.

    Args:
        title: heading, and the browser's title.
        lead: one sentence below it.
        marked: cells with this text are emphasized: "good" or "bad".
    """

    title: str
    lead: str
    marked: dict[str, str] = field(default_factory=dict)
    _parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """A section begins."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph of plain text."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def table(self, table: Table, summary: str = "") -> None:
        """A table; folded under `summary` where that is given."""
        head = "".join(self._cell(cell, "th", i < table.text) for i, cell in enumerate(table.columns))
        cells = (("".join(self._cell(cell, "td", i < table.text) for i, cell in enumerate(row))) for row in table.rows)
        rows = "".join(f"<tr>{row}</tr>" for row in cells)
        text = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        if summary:
            text = f"<details><summary>{escape(summary)}</summary>{text}</details>"
        self._parts.append(text)

    def _cell(self, text: str, tag: str, is_text: bool) -> str:
        kinds = [*(["text"] if is_text else []), *([self.marked[text]] if text in self.marked else [])]
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    def image(self, path: Path, alt: str) -> None:
        """A PNG file, put into the page itself."""
        content = base64.b64encode(path.read_bytes()).decode()
        self._parts.append(f'<img alt="{escape(alt)}" src="data:image/png;base64,{content}">')

    def html(self, footer: str) -> str:
        """The whole page; `footer` says how it was made."""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f'<h1>{escape(self.title)}</h1>\n<p class="lead">{escape(self.lead)}</p>\n'
            + "\n".join(self._parts)
            + f"\n<footer>{escape(footer)}</footer>\n</body>\n</html>\n"
        )
