"""The leaderboards through the real task code, on hand-made items: every task, every subtask, 100 and 0."""

import dataclasses
import json
import math

import pytest
from oracle import AntiOracle, Oracle

from eval.__main__ import main
from eval.answers import task_hash
from eval.harness import data_from, load_tasks
from eval.model import load_model
from eval.runner import run
from eval.suites import SUITES, choose, task_manager
from hf_ibnorm.base.errors import UserError

SIZES = {"arc_challenge": 1, "mmlu": 57, "leaderboard_bbh": 24, "leaderboard_math_hard": 7, "leaderboard_gpqa": 3}


@pytest.fixture(scope="module")
def knowing(long_checkpoint, mirror, tmp_path_factory):
    """Scores and directory of a model that knows every answer, or avoids them: knowing(Oracle, "v2")."""
    real = load_model(long_checkpoint, 8, "cpu", "auto")
    done = {}

    def scores(kind, suite):
        if (kind, suite) not in done:
            oracle = kind(pretrained=real.model, tokenizer=real.tokenizer, backend="causal", batch_size=8)
            folder = tmp_path_factory.mktemp("scores") / "out"
            done[kind, suite] = run(oracle, suite, str(folder), mirror=str(mirror)), folder
        return done[kind, suite]

    return scores


def whole(scores, suite):
    """The average, as the leaderboard takes it, whatever the number of items."""
    rows = scores["benchmarks"].values()
    return sum(100 * row["raw"] if suite == "v1" else row["normalized"] for row in rows) / 6


@pytest.mark.parametrize("suite", ["v1", "v2"])
def test_a_model_that_knows_every_answer_scores_100(knowing, suite):
    scores, _ = knowing(Oracle, suite)
    assert len(scores["benchmarks"]) == 6
    for name, row in scores["benchmarks"].items():
        assert row["raw"] == pytest.approx(1.0), name
        assert row["normalized"] == pytest.approx(100.0), name
        assert row["details"]["ties"] == 0
    assert whole(scores, suite) == pytest.approx(100.0)
    assert scores["average"] is None  # so few items are no leaderboard
    assert scores["notes"][-1] == "no average: other items"


@pytest.mark.parametrize("suite", ["v1", "v2"])
def test_a_model_that_avoids_every_answer_scores_0(knowing, suite):
    scores, _ = knowing(AntiOracle, suite)
    for name, row in scores["benchmarks"].items():
        assert row["raw"] == pytest.approx(0.0, abs=1e-12), name
        assert row["normalized"] == 0.0, name
    assert whole(scores, suite) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("suite", ["v1", "v2"])
def test_every_task_is_there_with_every_item(knowing, suite):
    scores, folder = knowing(Oracle, suite)
    for benchmark in SUITES[suite]:
        tasks = scores["benchmarks"][benchmark.name]["details"]["tasks"]
        assert tuple(tasks) == benchmark.tasks
        assert len(tasks) == SIZES.get(benchmark.name, len(tasks))
        result = json.loads((folder / "results" / f"{benchmark.name}.json").read_text())
        for name, task in result["tasks"].items():
            assert len(task["items"]) == task["size"] > 0
            assert task["shots"] == benchmark.shots, name


def test_second_scores_are_reported(knowing):
    scores, _ = knowing(Oracle, "v1")
    assert scores["benchmarks"]["gsm8k"]["details"]["exact_match,flexible-extract"] == 1.0
    assert scores["benchmarks"]["mmlu"]["details"]["size_weighted"] == 1.0
    scores, _ = knowing(Oracle, "v2")
    assert scores["benchmarks"]["leaderboard_ifeval"]["details"]["inst_level_strict_acc,none"] == 1.0


def test_prompts_are_those_that_the_scores_are_defined_by(knowing, fixtures):
    # Over documents, prompts and targets: another release of the harness that asks otherwise is noticed.
    found = {}
    for suite in ("v1", "v2"):
        scores, _ = knowing(Oracle, suite)
        for row in scores["benchmarks"].values():
            found |= {name: task["hash"] for name, task in row["details"]["tasks"].items()}
    assert found == json.loads((fixtures / "task_hashes.json").read_text())


@pytest.mark.parametrize("name", ["arc_challenge", "gsm8k", "leaderboard_math_hard"])
def test_prompts_are_the_harness_own_to_the_letter(knowing, long_checkpoint, mirror, tmp_path, name):
    # Examples are drawn at random for the first two: from the same state as when the harness runs by itself.
    from lm_eval import simple_evaluate

    benchmark = next(each for each in (*SUITES["v1"], *SUITES["v2"]) if each.name == name)
    real = load_model(long_checkpoint, 8, "cpu", "auto")
    oracle = Oracle(pretrained=real.model, tokenizer=real.tokenizer, backend="causal", batch_size=8)
    with data_from(mirror, tmp_path):
        theirs = simple_evaluate(
            oracle,
            tasks=[name],
            num_fewshot=benchmark.shots if benchmark.set_shots else None,
            task_manager=task_manager(benchmark.folders),
            bootstrap_iters=0,
        )
    _, folder = knowing(Oracle, "v2" if name.startswith("leaderboard") else "v1")
    ours = json.loads((folder / "results" / f"{name}.json").read_text())["tasks"]
    for task, samples in theirs["samples"].items():
        assert ours[task]["hash"] == task_hash(samples)


def test_gpqa_comes_out_in_the_same_order_whatever_ran_before(knowing, mirror, tmp_path):
    gpqa = next(each for each in SUITES["v2"] if each.name == "leaderboard_gpqa")
    _, folder = knowing(Oracle, "v2")
    kept = json.loads((folder / "results" / "leaderboard_gpqa.json").read_text())["tasks"]
    with data_from(mirror, tmp_path):
        for _ in range(2):
            _, loaded = load_tasks(gpqa)
            for name, task in loaded["tasks"].items():
                golds = [task.doc_to_target(doc) for doc in task.eval_docs]
                assert golds == [item["gold"] for item in kept[name]["items"]]
    assert len({gold for task in kept.values() for gold in (item["gold"] for item in task["items"])}) > 1


def golds_of(names, mirror, cache):
    """Task → right answers of the tasks of GPQA, loaded in this order."""
    cache.mkdir()
    found = {}
    with data_from(mirror, cache):
        for benchmark in choose(names):
            for name, task in load_tasks(benchmark)[1]["tasks"].items():
                found[name] = [task.doc_to_target(doc) for doc in task.eval_docs]
                assert found[name] == [task.doc_to_target(doc) for doc in task.eval_docs]
    return {name: golds for name, golds in found.items() if "gpqa" in name}


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_choices_of_gpqa_do_not_depend_on_what_was_loaded_before(mirror, tmp_path, monkeypatch, in_memory):
    if in_memory:  # then what was prepared is not kept, and GPQA draws anew whenever its items are asked for
        monkeypatch.setattr("datasets.config.IN_MEMORY_MAX_SIZE", 1 << 30)
    whole = golds_of("gsm8k,leaderboard_musr,leaderboard_gpqa", mirror, tmp_path / "first")
    parts = ["leaderboard_gpqa_main", "leaderboard_gpqa_extended", "leaderboard_gpqa_diamond"]
    assert golds_of(",".join([*parts, "leaderboard_musr"]), mirror, tmp_path / "second") == whole
    assert len(whole) == 3
    assert all(len(set(golds)) > 1 for golds in whole.values())


def test_a_folder_here_is_not_taken_for_a_data_set_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "truthfulqa" / "truthful_qa").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (benchmark,) = (each for each in SUITES["v1"] if each.name == "truthfulqa_mc2")
    with (
        data_from(None, tmp_path / "cache"),
        pytest.raises(UserError, match="would be read for the Hub's data set truth"),
    ):
        load_tasks(benchmark)


def test_another_definition_in_the_harness_is_refused(mirror, tmp_path):
    bbh = next(each for each in SUITES["v2"] if each.name == "leaderboard_bbh")
    changes = {
        "leaderboard_bbh_snarks: lm-eval has 2 choices": {"bounds": {**bbh.bounds, "leaderboard_bbh_snarks": 1 / 3}},
        "leaderboard_bbh_boolean_expressions: lm-eval gives 3 examples, this suite asks for 5": {"shots": 5},
        "leaderboard_bbh: lm-eval's tasks differ from this suite's: leaderboard_bbh_web_of_lies": {
            "tasks": bbh.tasks[:7] + bbh.tasks[8:]
        },
        "leaderboard_bbh_boolean_expressions: lm-eval has no f1 for it": {"metric": "f1"},
    }
    with data_from(mirror, tmp_path):
        for message, change in changes.items():
            with pytest.raises(UserError, match=message):
                load_tasks(dataclasses.replace(bbh, **change))


def test_a_column_named_alone_is_that_of_the_leaderboard(knowing, long_checkpoint, mirror, tmp_path):
    real = load_model(long_checkpoint, 8, "cpu", "auto")
    oracle = AntiOracle(pretrained=real.model, tokenizer=real.tokenizer, backend="causal", batch_size=8)
    alone = run(oracle, "leaderboard_musr,gsm8k", str(tmp_path / "out"), mirror=str(mirror))
    for name, suite in (("leaderboard_musr", "v2"), ("gsm8k", "v1")):
        assert alone["benchmarks"][name] == knowing(AntiOracle, suite)[0]["benchmarks"][name]
    assert alone["average"] is None


def test_tables_have_every_row_and_the_average(knowing):
    for suite in ("v1", "v2"):
        _, folder = knowing(Oracle, suite)
        markdown = (folder / "scores.md").read_text()
        assert "| Average | - | - |" in markdown
        for benchmark in SUITES[suite]:
            assert f"| {benchmark.title} | 1.000" in markdown
        latex = (folder / "scores.tex").read_text()
        assert latex.count(r"\\") == markdown.count("\n| ") - 1
        assert r"1.000 &" in latex  # no ± 0.000: of answers that are all right nobody knows how far off they may be
        assert r"$\pm$" not in latex


def test_scores_are_a_function_of_the_result_files(knowing, command, tmp_path):
    _, folder = knowing(Oracle, "v1")
    code, out, err = command(main, "score", str(folder), "--output", str(tmp_path / "again"))
    assert (code, err) == (0, "")
    assert "Average" in out
    for name in ("scores.json", "scores.md", "scores.csv", "scores.tex"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_suites_lists_what_each_consists_of(command):
    code, out, _ = command(main, "suites")
    assert code == 0
    for benchmarks in SUITES.values():
        assert all(each.title in out and each.name in out for each in benchmarks)
    assert "exact_match, strict-match" in out


def test_a_task_of_the_harness_may_be_named_itself(long_checkpoint, mirror, tmp_path, command):
    words = ["run", "--model", str(long_checkpoint), "--suite", "arc_challenge,arc_easy", "--mirror", str(mirror)]
    code, _, err = command(main, *words, "--output", str(tmp_path / "out"))
    assert (code, err.count("\n")) == (2, 1)
    assert "ai2_arc/README.md names no configuration ARC-Easy" in err
    scores = run(str(long_checkpoint), "truthfulqa_mc1", str(tmp_path / "mc1"), mirror=str(mirror))
    row = scores["benchmarks"]["truthfulqa_mc1"]
    assert scores["average"] is None
    assert row["details"]["metric"] == "acc"
    items = json.loads((tmp_path / "mc1" / "results" / "truthfulqa_mc1.json").read_text())["tasks"]["truthfulqa_mc1"]
    assert all(item["gold"] == 0 and item["chance"] == 1 / 2 for item in items["items"])
    assert row["chance"] == 0.5
    manifest = json.loads((tmp_path / "mc1" / "manifest.json").read_text())
    assert all(name.startswith("truthfulqa/truthful_qa/") for name in manifest["identity"]["mirror"])
    assert manifest["identity"]["mirror"]


def test_shares_of_very_unlikely_answers_are_shares_all_the_same(mirror, long_checkpoint, tmp_path):
    class Unlikely(Oracle):
        def loglikelihood(self, requests, disable_tqdm=False):
            return [(-900.0 - request.idx, False) for request in requests]

    real = load_model(long_checkpoint, 8, "cpu", "auto")
    lm = Unlikely(pretrained=real.model, tokenizer=real.tokenizer, backend="causal", batch_size=8)
    scores = run(lm, "truthfulqa_mc2", str(tmp_path / "out"), mirror=str(mirror))
    weights = [math.exp(-i) for i in range(4)]
    assert scores["benchmarks"]["truthfulqa_mc2"]["raw"] == pytest.approx(sum(weights[:2]) / sum(weights))


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


def test_a_chat_template_and_turns_change_the_prompts_and_nothing_else(long_checkpoint, mirror, tmp_path):
    lm = load_model(long_checkpoint, 8, "cpu", "auto")
    lm.tokenizer.chat_template = TEMPLATE
    gsm8k = [each.name for each in SUITES["v1"] if each.name != "gsm8k"]
    found = {}
    for name, more in {
        "plain": {},
        "chat": {"apply_chat_template": True},
        "turns": {"apply_chat_template": True, "fewshot_as_multiturn": True},
    }.items():
        oracle = Oracle(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", batch_size=8)
        folder = tmp_path / name
        scores = run(oracle, "v1", str(folder), mirror=str(mirror), skip=gsm8k, **more)
        assert scores["smoke"] is False
        assert scores["benchmarks"]["gsm8k"]["raw"] == 1.0
        found[name] = scores["benchmarks"]["gsm8k"]["details"]["tasks"]["gsm8k"]["hash"]
    assert len(set(found.values())) == 3


def test_a_changed_generation_setting_is_stamped_and_has_no_average(long_checkpoint, mirror, tmp_path):
    real = load_model(long_checkpoint, 8, "cpu", "auto")
    oracle = Oracle(pretrained=real.model, tokenizer=real.tokenizer, backend="causal", batch_size=8)
    others = [each.name for each in SUITES["v1"] if each.name != "gsm8k"]
    more = {"mirror": str(mirror), "skip": others, "gen_kwargs": {"max_gen_toks": 8}}
    scores = run(oracle, "v1", str(tmp_path / "out"), **more)
    assert scores["smoke"] is True
    assert "SMOKE - not a leaderboard score" in (tmp_path / "out" / "scores.md").read_text()
