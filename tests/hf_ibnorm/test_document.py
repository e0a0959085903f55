"""One description of a report gives its Markdown, its page and its LaTeX."""

import base64

import pytest

from hf_ibnorm.report.document import Document, readings
from hf_ibnorm.report.tables import Table

PNG = b"\x89PNG"


@pytest.fixture
def document(tmp_path):
    (tmp_path / "forest.png").write_bytes(PNG)
    document = Document("Norms <&> losses", {"worse": "bad"}, ["Made by `a <b>`.", "In a day."])
    document.lead("About it.", page_only=True)
    document.strong("Against a - worse: b.")
    table = Table(["norm", "verdict"], [["b|c", "worse"]], text=2)
    document.table(table, "Mean over seeds.", latex_caption="Norms & co")
    document.picture(tmp_path / "forest.png", "differences")
    document.heading("Details", page_only=True)
    document.folded(Table(["seed"], [["0"]]), "1 training", "cells.csv")
    document.folded(Table(["seed"], [["1"]]), "of no file")
    document.bullets(["one", "two"])
    document.bullets([])
    document.table(Table(["empty"]))
    return document


def test_markdown_leaves_to_the_page_what_files_hold(document):
    assert document.markdown() == (
        "# Norms <&> losses\n\n**Against a - worse: b.**\n\n| norm | verdict |\n| --- | --- |\n| b\\|c | worse |\n\n"
        "Mean over seeds.\n\n![differences](forest.png)\n\n1 training: [cells.csv](cells.csv).\n\n- one\n- two\n\n"
        "Made by `a <b>`.\n\nIn a day.\n"
    )


def test_the_page_needs_nothing_else(document):
    page = document.html()
    assert "<title>Norms &lt;&amp;&gt; losses</title>" in page
    assert '<p class="lead">About it.</p>' in page
    assert "<p><strong>Against a - worse: b.</strong></p>" in page
    assert '<td class="text">b|c</td><td class="text bad">worse</td>' in page
    assert f'<img alt="differences" src="data:image/png;base64,{base64.b64encode(PNG).decode()}">' in page
    assert page.count("<details>") == 2
    assert "<li>one</li><li>two</li>" in page
    assert "<footer>Made by <code>a &lt;b&gt;</code>. In a day.</footer>" in page
    assert "empty" not in page.partition("</style>")[2]


def test_latex_has_the_tables_with_a_caption(document, tmp_path):
    assert document.latex().count(r"\begin{table}") == 1
    assert r"\caption{Norms \& co}" in document.latex()
    document.write(tmp_path / "report.md", tmp_path / "report.tex")
    assert (tmp_path / "report.md").read_text() == document.markdown()
    assert (tmp_path / "report.tex").read_text() == document.latex()


def test_readings_are_one_paragraph_each(tmp_path):
    (tmp_path / "reading.md").write_text("## One\n\nof {{ rows | commas }}\nrows\n\n## Two\n\ntext\n")
    assert readings(tmp_path / "reading.md", rows=1234) == {"One": "of 1,234 rows", "Two": "text"}
