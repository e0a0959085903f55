"""What a study's report is written as: Markdown and one self-contained page, from the same parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_ibnorm.base.files import write_text
from hf_ibnorm.report.page import Page
from hf_ibnorm.report.tables import Table


@dataclass(frozen=True)
class Parts:
    """A report, from top to bottom.

    Args:
        title: heading.
        about: what the study asks.
        lines: the verdicts as sentences.
        table: the verdicts.
        caption: what the table shows.
        pictures: title and PNG file.
        reading: how to read the table.
        fair: what was equal, a sentence each.
        sections: title and table.
        trainings: every training, as in `cells.csv`.
        made: when, with what, and how, a sentence each.
        marked: cells that are emphasized in the page: "good" or "bad".
    """

    title: str
    about: str
    lines: Sequence[str]
    table: Table
    caption: str
    pictures: Sequence[tuple[str, Path]]
    reading: str
    fair: Sequence[str]
    sections: Sequence[tuple[str, Table]]
    trainings: Table
    made: Sequence[str]
    marked: Mapping[str, str]


def write_pages(parts: Parts, output: Path) -> None:
    """Write `report.md` and `report.html`, beside which the pictures lie, into `output`."""
    page = Page(parts.title, parts.about, dict(parts.marked))
    text = [f"# {parts.title}", parts.about, *(f"**{line}**" for line in parts.lines)]
    text += [parts.table.markdown(), parts.caption]
    for line in (*parts.lines, parts.caption):
        page.paragraph(line)
    page.table(parts.table)
    for title, path in parts.pictures:
        page.image(path, title)
        text.append(f"![{title}]({path.name})")
    page.heading("How to read it")
    page.paragraph(parts.reading)
    page.heading("What was equal")
    text += ["## How to read it", parts.reading, "## What was equal", "\n".join(f"- {line}" for line in parts.fair)]
    for line in parts.fair:
        page.paragraph(line)
    for title, each in parts.sections:
        page.heading(title)
        page.table(each)
        text += [f"## {title}", each.markdown()]
    count = f"{len(parts.trainings.rows)} trainings"
    page.heading("Every training")
    page.table(parts.trainings, count)
    text += ["## Every training", f"{count}: [cells.csv](cells.csv).", *parts.made]
    write_text(output / "report.md", "\n\n".join(part.rstrip("\n") for part in text if part) + "\n")
    write_text(output / "report.html", page.html(" ".join(parts.made)))
