"""Every code block in docs/ runs, in the order of its page; links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def run(page, folder, **environment):
    """Run a page's blocks: bash as it stands, python in one process so that names stay from block to block."""
    text = page.read_text(encoding="utf-8")
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    session = []
    for language, code in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            session.append(code)
            code = "\n".join(session)
        command = {"python": [sys.executable, "-c", code], "bash": ["bash", "-euo", "pipefail", "-c", code]}[language]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PATH": here, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{page.name}:\n{code}\n{done.stdout}\n{done.stderr}"
    return len(session)


def test_the_library_page_runs(tmp_path):
    page = DOCS / "library.md"
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    done = subprocess.run([sys.executable, "-c", blocks], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "library"], ids=lambda page: page.stem)
def test_the_pages_of_the_commands_run(page, tmp_path):
    assert run(page, tmp_path, OMP_NUM_THREADS="1") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).is_file(), link


def test_there_is_a_page_for_every_door():
    assert {"library", "training", "evaluation"} <= {page.stem for page in PAGES}
