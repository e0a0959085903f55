"""Every code block in docs/ runs, in the order of its page; links lead somewhere."""

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from warm import path, python

from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def run(page, folder):
    """Run a page: its blocks from top to bottom, those in Python that follow each other as one script."""
    environment = {**os.environ, "PATH": path(), "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    blocks = re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert "bash" in {language for language, _ in blocks} <= {"python", "bash"}
    for language, group in itertools.groupby(blocks, key=lambda block: block[0]):
        code = "\n".join(code for _, code in group)
        start = {"python": [python(), "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}[language]
        done = subprocess.run([*start, code], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}:\n{code}\n{done.stdout}\n{done.stderr}"


def tiny_model(folder):
    """A small stand-in for SmolLM2 where `make smollm2` would put it."""
    tokenizer = wrap_tokenizer(train_tokenizer(["a text to learn from " * 9], 300), 512)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300, max_position_embeddings=512)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_library_page_runs(tmp_path):
    run(DOCS / "library.md", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "library"], ids=lambda page: page.stem)
def test_the_pages_of_the_commands_run(page, tmp_path):
    (tmp_path / "mirror").symlink_to(Path(__file__).parent / "fixtures" / "leaderboard_mirror")
    tiny_model(tmp_path / "smollm2" / "model")
    run(page, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).is_file(), link


def test_there_is_a_page_for_every_door():
    assert {"library", "training", "convert", "evaluation", "studies"} <= {page.stem for page in PAGES}
