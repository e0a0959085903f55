"""A report, described once: from one `Document` come the Markdown, the HTML page and the LaTeX tables."""

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..base.files import write_text
from .plots import WIDTH
from .tables import Table


@dataclass(frozen=True)
class _Part:
    """A piece of a document: what the HTML template shows of it, and its Markdown and LaTeX ("" to leave it out)."""

    kind: str
    content: Any
    markdown: str
    label: str = ""
    latex: str = ""


@dataclass
class Document:
    """A report that is filled from top to bottom.

    Texts are plain, on one line; text between backticks is set as code. Markdown is for a reader who has the files of
    the report beside it, and the HTML page for one who has nothing else: the page holds its pictures, and with
    `page_only` what the Markdown leaves to the files.

    Args:
        title: heading, and the title of the browser's window; "" for none, which only Markdown may have.
        marked: text of a table's cell → its emphasis in the page, "good" or "bad".
        made: how the report was made, a sentence each; at the end.
    """

    title: str = ""
    marked: Mapping[str, str] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    _parts: list[_Part] = field(default_factory=list)

    def _add(self, kind: str, content: Any, markdown: str, **options: Any) -> None:
        self._parts.append(_Part(kind, content, markdown, **options))

    def lead(self, text: str, page_only: bool = False) -> None:
        """A sentence under the title; nothing where it is empty."""
        if text:
            self._add("lead", text, "" if page_only else text)

    def heading(self, text: str, page_only: bool = False) -> None:
        """A section begins."""
        self._add("heading", text, "" if page_only else f"## {text}")

    def paragraph(self, text: str) -> None:
        """A paragraph."""
        self._add("paragraph", text, text)

    def strong(self, text: str) -> None:
        """A paragraph that stands out."""
        self._add("strong", text, f"**{text}**")

    def bullets(self, lines: Iterable[str]) -> None:
        """A list; nothing where it has no line."""
        if lines := list(lines):
            self._add("list", lines, "\n".join(f"- {line}" for line in lines))

    def table(self, table: Table, caption: str = "", latex_caption: str | None = None, page_only: bool = False) -> None:
        """A table.

        Args:
            table: nothing is shown of one without rows.
            caption: a sentence below it.
            latex_caption: its caption in LaTeX, which leaves out tables that have none.
            page_only: whether Markdown leaves it out.
        """
        if table.rows:
            latex = "" if latex_caption is None else table.latex(latex_caption)
            self._add("table", table, "" if page_only else table.markdown(), latex=latex)
            if caption:
                self._add("caption", caption, caption)

    def folded(self, table: Table, summary: str, file: str = "") -> None:
        """A table that the page shows when its summary is clicked; Markdown has a link to the `file` that holds it."""
        self._add("folded", table, f"{summary}: [{file}]({file})." if file else "", label=summary)

    def picture(self, path: Path, alt: str) -> None:
        """A PNG file that lies beside the Markdown; the page takes it in, read when the page is made."""
        self._add("picture", path, f"![{alt}]({path.name})", label=alt)

    def markdown(self) -> str:
        """As GitHub Markdown, ending in a newline."""
        title = [f"# {self.title}"] if self.title else []
        texts = [*title, *(part.markdown for part in self._parts), *self.made]
        return "\n\n".join(text.rstrip("\n") for text in texts if text) + "\n"

    def html(self) -> str:
        """As a single file that can be mailed, archived and read without a network or a script."""
        content = {"title": self.title, "marked": self.marked, "parts": self._parts, "made": self.made}
        text: str = _page().render(**content, width=f"{WIDTH:g}")
        return text

    def latex(self) -> str:
        """Its tables that have a caption for LaTeX."""
        return "\n".join(part.latex for part in self._parts if part.latex)

    def write(self, *paths: Path) -> None:
        """Write it, whole or not at all, to each of `paths`, as their endings say: .md, .html or .tex."""
        formats = {".md": self.markdown, ".html": self.html, ".tex": self.latex}
        for path in paths:
            write_text(path, formats[path.suffix]())


def machine(environment: Mapping[str, Any]) -> str:
    """Device, cores, torch and date of an environment record, as a sentence about how something was made ends."""
    device, cores = environment["device"], environment["cpu_count"]
    return f"{device}, {cores} cores, torch {environment['versions']['torch']}, {environment['date'][:10]}"


def readings(path: Path, **values: Any) -> dict[str, str]:
    """How to read the numbers of a report: the sections of a Markdown file, filled in by jinja2.

    Args:
        path: its sections begin with `## `.
        **values: named in the file.

    Returns:
        Heading → one paragraph.
    """
    sections = template(path, autoescape=False).render(values).split("## ")[1:]
    return {heading: " ".join(text.split()) for heading, _, text in (each.partition("\n") for each in sections)}


@cache
def _page() -> Any:
    from markupsafe import Markup, escape

    def inline(text: str) -> Markup:
        return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))

    def base64_of(path: Path) -> str:
        return base64.b64encode(path.read_bytes()).decode()

    return template(Path(__file__).with_name("document.html"), inline=inline, base64=base64_of)


def template(path: Path, autoescape: bool = True, **filters: Any) -> Any:
    """A jinja2 template from a file, in which a line of nothing but a `{% %}` leaves no line.

    Its filters are those given and `commas`, as in 1,000.
    """
    from jinja2 import Environment

    options: Any = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(autoescape=autoescape, **options)
    environment.filters |= {"commas": "{:,}".format, **filters}
    return environment.from_string(path.read_text(encoding="utf-8"))
