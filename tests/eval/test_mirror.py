"""The mirror: planned, fetched and checked against a hub on this machine, made of the fixture's files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub import FIRST_COMMIT, hub_of

from eval.__main__ import main
from eval.harness import data_from, load_tasks
from eval.mirror import DataSet, problems, sets_of
from eval.suites import SUITES
from hf_ibnorm.base.files import sha256_file

ROOT = Path(__file__).parents[2]
GATED = "Idavidrein/gpqa"


@pytest.fixture(scope="module")
def hub(mirror, tmp_path_factory):
    """A hub with the fixture's data sets and a configuration that no suite asks for; what is sent to commands, too."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(mirror, root, dirs_exist_ok=True)
    card = root / "openai" / "gsm8k" / "README.md"
    more = "- config_name: socratic\n  data_files:\n  - split: train\n    path: socratic/train.jsonl\n---\n"
    card.write_text(card.read_text().rstrip().removesuffix("---") + more)
    (card.parent / "socratic").mkdir()
    (card.parent / "socratic" / "train.jsonl").write_text('{"question": "no", "answer": "no"}\n')
    with hub_of(root, tmp_path_factory.mktemp("home"), gated={GATED}) as served:
        yield served


def mirror_command(hub, *words):
    return subprocess.run(
        [sys.executable, "-m", "eval", "mirror", *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=hub[1]
    )


@pytest.fixture(scope="module")
def fetched(hub, tmp_path_factory):
    """A mirror of the first leaderboard, from that hub."""
    folder = tmp_path_factory.mktemp("mirrors") / "v1"
    done = mirror_command(hub, "fetch", "--suite", "v1", "--mirror", folder)
    assert done.returncode == 0, done.stderr
    assert "cais/mmlu" in done.stdout
    return folder


def test_plan_lists_sets_and_sizes_and_fetches_nothing(hub, mirror, tmp_path):
    hub[0].asked.clear()
    done = mirror_command(hub, "plan", "--suite", "v1")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == sorted({each.repository for each in sets_of(SUITES["v1"])})
    counts = {row[0]: (int(row[1]), int(row[2])) for row in rows}
    assert counts["cais/mmlu"] == (57, len(list((mirror / "cais/mmlu").rglob("*.*"))))
    assert counts["openai/gsm8k"] == (1, 3)  # two splits and the card
    assert all(name.endswith("README.md") for name in hub[0].asked)


def test_a_fetched_mirror_holds_what_the_suites_need_and_no_more(hub, fetched, mirror):
    assert problems(fetched, sets_of(SUITES["v1"])) == []
    assert not (fetched / "openai" / "gsm8k" / "socratic").exists()
    for path in (fetched / "cais").rglob("*.jsonl"):
        assert path.read_bytes() == (mirror / path.relative_to(fetched)).read_bytes()
    kept = json.loads((fetched / "mirror.json").read_text())["openai/gsm8k"]
    assert kept["revision"] == FIRST_COMMIT
    assert kept["files"]["main/test.jsonl"] == sha256_file(fetched / "openai/gsm8k/main/test.jsonl")
    assert sorted(path.name for path in fetched.iterdir() if path.name.startswith(".")) == []


def test_the_harness_reads_a_fetched_mirror(fetched, tmp_path):
    # The card of gsm8k still names the configuration that was not fetched.
    with data_from(fetched, tmp_path):
        for name in ("gsm8k", "arc_challenge"):
            benchmark = next(each for each in SUITES["v1"] if each.name == name)
            _, loaded = load_tasks(benchmark)
            assert len(loaded["tasks"][name].eval_docs) > 0


def test_a_changed_or_missing_file_is_found_and_mended_and_no_other_touched(hub, fetched, tmp_path, command):
    folder = tmp_path / "mirror"
    shutil.copytree(fetched, folder)
    check = ["mirror", "check", "--suite", "v1", "--mirror", str(folder)]
    code, out, _ = command(main, *check)
    assert code == 0
    assert "is whole: 6 data sets" in out
    changed, gone = folder / "openai/gsm8k/main/test.jsonl", folder / "allenai/winogrande/winogrande_xl/train.jsonl"
    changed.write_text(changed.read_text() + "\n")
    gone.unlink()
    code, out, err = command(main, *check)
    assert code == 2
    assert f"{changed} has changed since it was fetched" in out
    assert f"{gone} is missing" in out
    assert err.count("\n") == 1
    hub[0].asked.clear()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}
    assert mirror_command(hub, "fetch", "--suite", "v1", "--mirror", folder).returncode == 0
    assert command(main, *check)[0] == 0
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}
    moved = {path.relative_to(folder).parts[:2] for path in after if before.get(path) != after[path]}
    assert moved == {("openai", "gsm8k"), ("allenai", "winogrande"), ("mirror.json",)}
    assert hub[0].asked == []  # the Hub's own cache has the files


def test_a_gated_set_says_how_to_get_access(hub, tmp_path):
    done = mirror_command(hub, "fetch", "--suite", "v2", "--mirror", tmp_path / "mirror")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{GATED}" in done.stderr
    assert f"accept its terms at https://huggingface.co/datasets/{GATED}, then `hf auth login`" in done.stderr
    # What came before it is whole.
    assert problems(tmp_path / "mirror", {DataSet("DigitalLearningGmbH/MATH-lighteval", "algebra")}) == []


@pytest.mark.slow
def test_a_run_without_access_to_a_gated_set_stops_before_it_loads_anything(hub, checkpoint, tmp_path):
    words = ["--model", checkpoint, "--suite", "v2", "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "eval", "run", *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=hub[1]
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: access: {GATED} is gated: accept its terms at")
    assert done.stderr.count("\n") == 1


def test_a_mirror_made_by_hand_is_checked_for_its_files(mirror, tmp_path, command):
    sets = sets_of([*SUITES["v1"], *SUITES["v2"]])
    assert len(sets) > 57
    assert problems(mirror, sets) == []
    assert problems(tmp_path, [DataSet("a/b", None)]) == [f"{tmp_path / 'a/b'} is missing"]
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert problems(tmp_path, [DataSet("a/b", None)]) == [f"{tmp_path / 'a/b' / '*.parquet'} is missing"]
    (tmp_path / "a" / "b" / "test.csv").write_text("x\n1\n")
    assert problems(tmp_path, [DataSet("a/b", None)]) == []
    card = "---\nconfigs:\n- config_name: one\n  data_files: test.csv\n---\n"
    (tmp_path / "a" / "b" / "README.md").write_text(card)
    assert problems(tmp_path, [DataSet("a/b", "one")]) == []
    assert problems(tmp_path, [DataSet("a/b", "two")]) == [
        f"{tmp_path / 'a/b' / 'README.md'} names no configuration two"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fetch"], "mirror: `mirror fetch` needs --mirror DIR"),
        (
            ["plan", "--suite", "leaderboard"],
            "suite: got 'leaderboard', allowed are embedded, v1, v2 and tasks of lm-eval 0.4.13 (use v1 and v2 for the "
            "leaderboards)",
        ),
    ],
)
def test_bad_input_is_one_line(command, words, message):
    code, _, err = command(main, "mirror", *words)
    assert (code, err) == (2, f"error: {message}\n")
