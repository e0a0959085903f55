"""A report, described once: a `Document` is written as Markdown, as an HTML page and as LaTeX tables."""

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.files import write_text
from .plots import WIDTH
from .tables import Table


@dataclass(frozen=True)
class _Part:
    """A piece of a document: what the HTML template shows, and its Markdown and LaTeX, "" where it has none."""

    kind: str
    content: Any
    markdown: str
    label: str = ""
    latex: str = ""


@dataclass
class Document:
    """A report that is filled from top to bottom.

    Texts are plain, on one line; text between backticks is set as code. The Markdown lies beside the report's other
    files; the HTML page stands alone, with the pictures, and with parts that are `page_only`.

    Args:
        title: heading, and title of the browser's window; may be "" where only Markdown is written.
        marked: text of a table's cell → its emphasis in the page, "good" or "bad".
        made: sentences at the end that say how the report was made.
    """

    title: str = ""
    marked: Mapping[str, str] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    _parts: list[_Part] = field(default_factory=list)

    def lead(self, text: str, page_only: bool = False) -> None:
        """Add a sentence under the title; nothing for an empty text."""
        if text:
            self._parts.append(_Part("lead", text, "" if page_only else text))

    def heading(self, text: str, page_only: bool = False) -> None:
        """Begin a section."""
        self._parts.append(_Part("heading", text, "" if page_only else f"## {text}"))

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(_Part("paragraph", text, text))

    def strong(self, text: str) -> None:
        """Add a paragraph in bold."""
        self._parts.append(_Part("strong", text, f"**{text}**"))

    def bullets(self, lines: Iterable[str]) -> None:
        """Add a list; nothing for no lines."""
        if lines := list(lines):
            self._parts.append(_Part("list", lines, "\n".join(f"- {line}" for line in lines)))

    def table(self, table: Table, caption: str = "", latex_caption: str | None = None, page_only: bool = False) -> None:
        """Add a table, with a caption below it; nothing for a table without rows.

        In LaTeX the caption is `latex_caption`, and a table is left out where that is None.
        """
        if table.rows:
            latex = "" if latex_caption is None else table.latex(latex_caption)
            self._parts.append(_Part("table", table, "" if page_only else table.markdown(), latex=latex))
            if caption:
                self._parts.append(_Part("caption", caption, caption))

    def folded(self, table: Table, summary: str, file: str = "") -> None:
        """Add a table that the page shows when its summary is clicked; Markdown links to the `file` that holds it."""
        self._parts.append(_Part("folded", table, f"{summary}: [{file}]({file})." if file else "", summary))

    def picture(self, path: Path, alt: str) -> None:
        """Add a PNG file that lies beside the Markdown; the page embeds it, and `html` reads it."""
        self._parts.append(_Part("picture", path, f"![{alt}]({path.name})", alt))

    def markdown(self) -> str:
        """The document as GitHub Markdown, ending in a newline."""
        title = [f"# {self.title}"] if self.title else []
        texts = [*title, *(part.markdown for part in self._parts), *self.made]
        return "\n\n".join(text.rstrip("\n") for text in texts if text) + "\n"

    def html(self) -> str:
        """The document as one HTML file, to be mailed, archived and read without a network or a script."""
        from markupsafe import Markup, escape

        def inline(text: str) -> Markup:
            return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))

        def base64_of(path: Path) -> str:
            return base64.b64encode(path.read_bytes()).decode()

        page = template(Path(__file__).with_name("document.html"), inline=inline, base64=base64_of)
        return page.render(title=self.title, marked=self.marked, parts=self._parts, made=self.made, width=f"{WIDTH:g}")

    def latex(self) -> str:
        """The tables that have a caption for LaTeX."""
        return "\n".join(part.latex for part in self._parts if part.latex)

    def write(self, *paths: Path) -> None:
        """Write the document to each path, in the format of its ending: .md, .html or .tex."""
        formats = {".md": self.markdown, ".html": self.html, ".tex": self.latex}
        for path in paths:
            write_text(path, formats[path.suffix]())


def machine(environment: Mapping[str, Any]) -> str:
    """Device, cores, version of torch and date of an environment record, as the end of a sentence."""
    device, cores = environment["device"], environment["cpu_count"]
    return f"{device}, {cores} cores, torch {environment['versions']['torch']}, {environment['date'][:10]}"


def readings(path: Path, **values: Any) -> dict[str, str]:
    """How to read the numbers of a report: heading → text, as one paragraph, of each section of a Markdown file.

    The file is a jinja2 template with the variables `values`; a section begins with `## ` and its heading.
    """
    sections = template(path, autoescape=False).render(values).split("## ")[1:]
    parted = [section.partition("\n") for section in sections]
    return {heading: " ".join(text.split()) for heading, _, text in parted}


def template(path: Path, autoescape: bool = True, **filters: Any) -> Any:
    """The jinja2 template in a file; a line that holds only a `{% %}` leaves no line.

    `autoescape`: whether values are escaped for HTML. It has the filters given, and `commas`, as in 1,000.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"commas": "{:,}".format, **filters}
    return environment.from_string(path.read_text(encoding="utf-8"))
