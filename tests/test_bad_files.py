"""Random damage to every file that a user hands to a command: one line and exit code 2, or the command does its work.

Never a traceback, whatever is in the file.
"""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from training import run_on_pages, small_corpus

import eval.__main__
import hf_ibnorm.cli
import hf_ibnorm.report.__main__
import train_lm.__main__
import train_lm.plot
from eval.runner import run as score
from eval.study import STUDIES
from eval.study.plan import read_study
from hf_ibnorm.base.command import run_command
from train_lm.config import RECIPES

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)

STRANGE = (
    *(
        None,
        True,
        0,
        -1,
        10**20,
        1e20,
        0.5,
        float("nan"),
        "",
        "x",
        "\0",
        "../x",
        "a" * 5000,
        [],
        [1],
        [[]],
        {},
        {"a": 1},
    ),
    *([{}], {"": None}, [None] * 3, "é\ud7ff", "None", -(2**63), 2**31),
)
"""What may stand where something else should."""


def places(content, path=()):
    """Every place in some JSON, as a sequence of keys."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def with_value(content, path, value):
    """A copy with another value at a place; without it for `...`."""
    if not path:
        return None if value is ... else value
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


@st.composite
def damaged(draw, name, whole):
    """Bytes that are like those of a file of that name, and wrong somewhere."""
    text = draw(st.sampled_from(["values", "values", "values", "bytes"])) == "values"
    kind = Path(name).suffix
    if text and kind in (".json", ".jsonl", ".yaml", ".yml"):
        rows = [json.loads(line) for line in whole.splitlines()] if kind == ".jsonl" else yaml.safe_load(whole)
        short = [path for path in places(rows) if len(path) < 6][:400]
        rows = with_value(rows, draw(st.sampled_from(short)), draw(st.sampled_from([..., *STRANGE])))
        if kind == ".jsonl" and isinstance(rows, list):
            return "".join(json.dumps(row) + "\n" for row in rows).encode()
        return (yaml.safe_dump(rows, allow_unicode=True) if kind[1] == "y" else json.dumps(rows)).encode()
    at = draw(st.integers(0, len(whole)))
    end = draw(st.sampled_from([at, at + 1, len(whole)]))
    return (
        whole[:at] + draw(st.sampled_from([b"", b"\xff", b"\0", b"{", b"[", b'"', b"1", b"\xef\xbb\xbf"])) + whole[end:]
    )


def answers(main, *words):
    """Run a command in this process: its exit code, 0 or 2, where an exception would be a traceback."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["command", *words])
        AcceleratorState._reset_state(True)
        with pytest.raises(SystemExit) as ending:
            main() if main is not study else main(*words)
    assert ending.value.code in (0, 2)


SHORT = ["--max_steps", "4", "--eval_every", "2", "--checkpoint_every", "3", "--warmup_steps", "1", "--log_with", "[]"]
ONE_STEP = ["--config", "tiny", "--max_steps", "1", "--warmup_steps", "0", "--log_with", "[]", "--run_dir", "NEW"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, one that stopped before its last step, scores, text, a recipe and a study."""
    folder = tmp_path_factory.mktemp("runs")
    run_on_pages(folder / "run", *SHORT)
    score(str(folder / "run"), "sva_simple", str(folder / "scores"), limit=3)
    shutil.copytree(folder / "scores", folder / "run/scores")
    shutil.copytree(folder / "run", folder / "stopped", ignore=lambda *_: ["final", "scores"])
    shutil.copyfile(RECIPES / "tiny.yaml", folder / "own.yaml")
    shutil.copyfile(STUDIES / "quick.yaml", folder / "study.yaml")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": "a line " * 200}) + "\n" for _ in range(20)))
    return folder


def study(path):
    """Read a study's file, as every command on studies does first; what follows would train."""
    run_command(lambda: read_study(path), lower="")


REPORT = (hf_ibnorm.report.__main__.main, "run", "--output", "NEW")
RESUME = (train_lm.__main__.main, "--config", "tiny", "--run_dir", "stopped", "--resume", "auto", *SHORT)
CONVERT = (hf_ibnorm.cli.main, "convert", "run/final", "NEW", "--norm", "ibnorm_l", "--no_report")
LOOK = (
    hf_ibnorm.cli.main,
    *[
        "analyze",
        "--tokens",
        "512",
        "--skip",
        "normality",
        "noise",
        "information",
        "--output",
        "NEW",
        "--model",
        "run/final",
    ],
)
START = (train_lm.__main__.main, *ONE_STEP, "--model.init_from", "run/final")
TEXT = (
    train_lm.__main__.main,
    *ONE_STEP,
    *["--corpus", "text.jsonl", "--tokenizer", "run/final", "--cache_dir", "cache"],
)
SCORE = (eval.__main__.main, "score", "scores")
COMPARE = (eval.__main__.main, "compare", "scores", "scores", "--output", "NEW")
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
READERS = [
    ("own.yaml", (train_lm.__main__.main, "--config", "own.yaml", "--run_dir", "NEW", "--check")),
    ("study.yaml", (study, "study.yaml")),
    *((f"run/{name}", REPORT) for name in ("config.yaml", "environment.json", "metrics.jsonl", "scores/scores.json")),
    ("run/metrics.jsonl", (train_lm.plot.main, "run", "--output", "plot.png")),
    *((f"stopped/{name}", RESUME) for name in ("config.yaml", "environment.json", "metrics.jsonl")),
    *((f"stopped/checkpoints/step-3/{name}", RESUME) for name in ("manifest.json", "state.json")),
    *((f"run/final/{name}", words) for words in (CONVERT, LOOK, START) for name in MODEL),
    ("text.jsonl", TEXT),
    *((f"scores/{name}", words) for words in (SCORE, COMPARE) for name in ("manifest.json", "results/sva_simple.json")),
]


@pytest.mark.random
@pytest.mark.parametrize(("file", "words"), READERS, ids=lambda each: each if isinstance(each, str) else "")
@examples(20)
@given(data=st.data())
def test_a_damaged_file_is_no_traceback(trained, file, words, data):
    folder = trained / f"case-{os.getpid()}"
    shutil.copytree(trained, folder, ignore=lambda _, names: [each for each in names if each.startswith("case")])
    here = os.getcwd()
    os.chdir(folder)
    try:
        Path(file).write_bytes(data.draw(damaged(file, Path(file).read_bytes())))
        answers(words[0], *words[1:])
    finally:
        os.chdir(here)
        torch.set_num_threads(1)
        shutil.rmtree(folder)
