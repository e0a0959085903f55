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

import hf_ibnorm.cli
import hf_ibnorm.report.__main__
import train_lm.__main__
import train_lm.plot

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
        patched.setattr("sys.argv", ["command", *map(str, words)])
        AcceleratorState._reset_state(True)
        with pytest.raises(SystemExit) as ending:
            main()
    assert ending.value.code in (0, 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run and one that stopped before its last step."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [
        "--max_steps",
        "4",
        "--eval_every",
        "2",
        "--checkpoint_every",
        "3",
        "--warmup_steps",
        "1",
        "--log_with",
        "[]",
    ]
    run_on_pages(folder / "run", *flags)
    shutil.copytree(folder / "run", folder / "stopped")
    shutil.rmtree(folder / "stopped/final")
    return folder


FILES = {
    "a recipe": "own.yaml",
    "a run's settings": "run/config.yaml",
    "a run's environment": "run/environment.json",
    "a run's metrics": "run/metrics.jsonl",
    "settings to resume with": "stopped/config.yaml",
    "an environment to resume in": "stopped/environment.json",
    "a checkpoint's manifest": "stopped/checkpoints/step-3/manifest.json",
    "a checkpoint's state": "stopped/checkpoints/step-3/state.json",
    "a config to convert": "run/final/config.json",
    "weights to convert": "run/final/model.safetensors",
    "a tokenizer to convert": "run/final/tokenizer.json",
    "settings of a tokenizer to convert": "run/final/tokenizer_config.json",
    "a config to start from": "run/final/config.json",
    "a tokenizer to start from": "run/final/tokenizer.json",
    "settings of a tokenizer to start from": "run/final/tokenizer_config.json",
    "a config to look at": "run/final/config.json",
    "a tokenizer to look at": "run/final/tokenizer.json",
    "lines of text": "text.jsonl",
}


def command(name, folder):
    """The command that reads the file, as its main function and words."""
    run, final = folder / "run", folder / "run/final"
    train = train_lm.__main__.main
    short = [
        "--config",
        "tiny",
        "--max_steps",
        "1",
        "--warmup_steps",
        "0",
        "--run_dir",
        folder / "new",
        "--log_with",
        "[]",
    ]
    if name == "a recipe":
        return train, "--config", folder / "own.yaml", "--run_dir", folder / "new", "--check"
    if name.startswith("a run's"):
        plots = name == "a run's metrics"
        return (
            (train_lm.plot.main if plots else hf_ibnorm.report.__main__.main),
            run,
            "--output",
            folder / ("a.png" if plots else "out"),
        )
    if "resume" in name or "checkpoint" in name:
        flags = ["--max_steps", "4", "--eval_every", "2", "--checkpoint_every", "3", "--warmup_steps", "1"]
        return (
            train,
            "--config",
            "tiny",
            "--run_dir",
            folder / "stopped",
            "--resume",
            "auto",
            *flags,
            "--log_with",
            "[]",
        )
    if "to convert" in name:
        return hf_ibnorm.cli.main, "convert", final, folder / "new", "--norm", "ibnorm_l", "--no_report"
    if "to start from" in name:
        return train, *short, "--model.init_from", final
    if "to look at" in name:
        skip = ("--skip", "normality", "noise", "information")
        return hf_ibnorm.cli.main, "analyze", "--model", final, "--tokens", "512", *skip, "--output", folder / "new"
    return train, *short, "--corpus", folder / "text.jsonl", "--tokenizer", final, "--cache_dir", folder / "cache"


@pytest.mark.random
@pytest.mark.parametrize("name", FILES)
@examples(20)
@given(data=st.data())
def test_a_damaged_file_is_no_traceback(trained, name, data):
    if not (trained / "own.yaml").exists():
        shutil.copyfile(Path(train_lm.__file__).parent / "recipes/tiny.yaml", trained / "own.yaml")
        (trained / "text.jsonl").write_text("".join(json.dumps({"text": "a line " * 200}) + "\n" for _ in range(20)))
    folder = trained / f"case-{os.getpid()}"
    shutil.copytree(trained, folder, ignore=lambda _, names: [each for each in names if each.startswith("case")])
    file = folder / FILES[name]
    try:
        file.write_bytes(data.draw(damaged(FILES[name], file.read_bytes())))
        answers(*command(name, folder))
    finally:
        torch.set_num_threads(1)
        shutil.rmtree(folder)
