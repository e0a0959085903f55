"""Tasks of the user's own: found, scored, known by their files; and each answered whatever stands beside it."""

import json
import re
import shutil

import pytest

from eval.__main__ import main
from eval.runner import run
from hf_ibnorm.base.errors import UserError

CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
WRITTEN = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
process_docs: !function drawing.shuffled
doc_to_text: !function drawing.question
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: true, temperature: 1.0, max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""
DRAWING = """\
import random

import numpy as np

def shuffled(dataset):
    return dataset.map(lambda row: {"order": random.sample(range(3), 3)})

def question(row):
    return f"{row['question']} {row['order']} {np.random.randint(1000)}"
"""


@pytest.fixture
def own(tmp_path):
    """Folder with task files: two of choices, two of drawn prompts and sampled answers, and a group of either."""
    folder = tmp_path / "own"
    folder.mkdir()
    data = folder / "items.jsonl"
    rows = [{"question": f"What is {i}?", "choices": ["one", "two", "three"], "gold": i % 3} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "drawing.py").write_text(DRAWING)
    for name, text in {"mine": CHOICE, "mine_too": CHOICE, "drawn_a": WRITTEN, "drawn_b": WRITTEN}.items():
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=data))
    (folder / "all.yaml").write_text("group: mine_all\ntask: [mine, mine_too]\n")
    return folder


def items(out, *benchmark):
    results = [json.loads((out / "results" / f"{name}.json").read_text())["tasks"] for name in benchmark]
    return {name: (task["hash"], task["items"]) for tasks in results for name, task in tasks.items()}


def test_own_tasks_are_scored_beside_those_of_suites(long_checkpoint, own, tmp_path, mirror, command):
    words = ["run", "--model", str(long_checkpoint), "--tasks", "mine_all,winogrande", "--include_path", str(own)]
    code, out, err = command(main, *words, "--mirror", str(mirror), "--output", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert "SMOKE" not in out
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    row = scores["benchmarks"]["mine_all"]
    assert (row["n"], row["chance"]) == (8, pytest.approx(1 / 3))
    assert set(row["details"]["tasks"]) == {"mine", "mine_too"}
    identity = json.loads((tmp_path / "out" / "manifest.json").read_text())["identity"]
    assert set(identity["include_path"]) == {
        *(f"{n}.yaml" for n in ("mine", "mine_too", "drawn_a", "drawn_b", "all")),
        "drawing.py",
    }
    # As its files say it: another metric is another run.
    (own / "mine.yaml").write_text((own / "mine.yaml").read_text() + "description: Answer.\n")
    with pytest.raises(UserError, match=r"holds a run with another include_path.mine.yaml"):
        run(
            str(long_checkpoint),
            "mine_all,winogrande",
            str(tmp_path / "out"),
            include_path=str(own),
            mirror=str(mirror),
        )


def test_the_number_of_examples_is_set_noted_and_stamps_a_suite(long_checkpoint, own, tmp_path, mirror):
    scores = run(str(long_checkpoint), "mine", str(tmp_path / "out"), include_path=str(own), num_fewshot=2)
    assert scores["smoke"] is False
    assert "with 2 examples in each prompt, as --num_fewshot says" in scores["notes"]
    assert json.loads((tmp_path / "out" / "results" / "mine.json").read_text())["tasks"]["mine"]["shots"] == 2
    scores = run(str(long_checkpoint), "winogrande", str(tmp_path / "suite"), mirror=str(mirror), num_fewshot=2)
    assert scores["smoke"] is True
    with pytest.raises(UserError, match=r"num_fewshot: got 1000000000, mine has \d+ examples to draw from"):
        run(str(long_checkpoint), "mine", str(tmp_path / "many"), include_path=str(own), num_fewshot=10**9)
    with pytest.raises(UserError, match="num_fewshot: got 2, austen_test scores whole documents"):
        run(str(long_checkpoint), "austen_test", str(tmp_path / "novel"), num_fewshot=2)


def test_drawn_prompts_and_sampled_answers_do_not_depend_on_the_tasks_before(long_checkpoint, own, tmp_path):
    (own / "ab.yaml").write_text("group: ab\ntask: [drawn_a, drawn_b]\n")
    (own / "ba.yaml").write_text("group: ba\ntask: [drawn_b, drawn_a]\n")
    found = []
    for names in ("drawn_b,drawn_a", "ab", "ba"):
        run(str(long_checkpoint), names, str(tmp_path / names), include_path=str(own))
        found.append(items(tmp_path / names, *names.split(",")))
    assert found[0] == found[1] == found[2]
    hashes = {hash_ for hash_, _ in found[0].values()}
    assert len(hashes) == 1  # one task under two names
    assert len({item["answer"] for _, items in found[0].values() for item in items}) > 1


BROKEN = {
    "the name of a suite's": ("task: gsm8k\ndataset_path: json\n", "a", "has a task 'gsm8k', which is the name of one"),
    "no YAML": ("task: [\n", "a", "include_path: .*mine.yaml cannot be read"),
    "another name": ("task: mine\ndataset_path: json\n", "mien", "got 'mien', allowed are .*did you mean 'mine'"),
    "none of them": ("task: mine\ndataset_path: json\n", "sva_simple", "has none of sva_simple, but mine"),
    "twice": ("task: mine\ndataset_path: json\n", "mine", "'mine' is in .*mine.yaml and in .*other.yaml"),
    "no task": ("dataset_path: json\n", "mine", "own has no task; there must be a file"),
    "no such data": (CHOICE.format(name="mine", data="/nowhere.jsonl"), "mine", "mine: its data cannot be loaded: "),
    "no metric": (
        CHOICE.replace("acc}}", "f1}}").format(name="mine", data="DATA"),
        "mine",
        "mine has none of the metrics",
    ),
    "no such field": (
        CHOICE.replace("choice: choices", "choice: options").format(name="mine", data="DATA"),
        "mine",
        "mine: ",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_task_of_ones_own_is_said_in_a_line(checkpoint, tmp_path, name, command):
    text, asked, message = BROKEN[name]
    (tmp_path / "own").mkdir()
    (tmp_path / "items.jsonl").write_text(json.dumps({"question": "?", "choices": ["a", "b"], "gold": 0}) + "\n")
    (tmp_path / "own" / "mine.yaml").write_text(text.replace("DATA", str(tmp_path / "items.jsonl")))
    words = ["run", "--model", str(checkpoint), "--suite", asked, "--include_path", str(tmp_path / "own")]
    if name == "twice":
        shutil.copy(tmp_path / "own" / "mine.yaml", tmp_path / "own" / "other.yaml")
    code, _, err = command(main, *words, "--output", str(tmp_path / "out"))
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()
