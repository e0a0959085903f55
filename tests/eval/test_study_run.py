"""Carrying a study out: what is done is never repeated, what goes wrong is reported, and what is unequal is refused."""

import csv
import json
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
from studying import TINY, Here, here, report, rewrite, study  # noqa: F401
from training import small_corpus  # noqa: F401

import eval.study.jobs
from eval.study.figures import sweeps_of
from eval.study.folder import Folder
from eval.study.plan import read_study
from eval.study.results import BASELINE, NO_BASELINE, ONE_SEED, REFUSED, UNFINISHED
from eval.study.status import print_status
from eval.study.training import DIVERGED, FAILED, TRAINED, Training, mean_losses
from hf_ibnorm.base.errors import UserError
from hf_ibnorm.report.runs import Run

ALIAS = {"norm": "rmsnorm", "name": "another name"}
HANDICAPPED = {"norm": "rmsnorm", "name": "handicapped", "learning_rate_scale": 0.1}


def test_a_norm_against_itself_and_against_a_handicapped_copy(here):  # noqa: F811
    folder, executor, _ = here(study(norms=["rmsnorm", ALIAS, HANDICAPPED], seeds=[0, 1, 2]))
    groups = report(folder)
    same, worse = groups["another name"], groups["handicapped"]
    assert groups["rmsnorm"].verdict == BASELINE
    assert same.differences == [0.0] * 3
    assert (same.verdict, same.adjusted) == ("not distinguishable", 1.0)
    assert worse.verdict == "worse"
    assert worse.paired.interval[0] > 0
    assert worse.learning_rate == pytest.approx(0.1 * groups["rmsnorm"].learning_rate)
    text = (folder.path / "report" / "report.md").read_text()
    assert "6 pairs of trainings have equal initial values of the shared parameters" in text
    assert "NOTE: on purpose, handicapped has 0.1 times every learning rate." in text
    # Two learning rates on one seed, then two more seeds, for each of three norms.
    assert len(executor.jobs) == len(set(executor.jobs)) == 3 * (2 + 2)


def test_what_is_finished_is_not_repeated_and_the_report_is_the_same(here):  # noqa: F811
    plan = study(norms=["rmsnorm", "ibnorm_t"], seeds=[0, 1])
    whole, _, _ = here(plan, "whole")
    expected = report(whole)
    seen = []
    for _ in range(6):  # two norms, each two learning rates and another seed; one training at a time
        folder, executor, _ = here(plan, "part", room=1)
        seen += executor.jobs
    assert len(seen) == len(set(seen)) == 6
    folder, executor, _ = here(plan, "part")
    assert executor.jobs == []
    found = report(folder)
    assert {name: (each.verdict, each.differences, each.learning_rate) for name, each in found.items()} == {
        name: (each.verdict, each.differences, each.learning_rate) for name, each in expected.items()
    }
    assert (folder.path / "report" / "verdicts.csv").read_bytes() == (
        whole.path / "report" / "verdicts.csv"
    ).read_bytes()


def test_the_learning_rate_is_chosen_by_validation_and_its_training_is_one_of_the_compared(here):  # noqa: F811
    folder, executor, _ = here(study(norms=["rmsnorm"], seeds=[0, 1], learning_rates=[1e-3, 0.02, 2e-3]))
    group = report(folder)["rmsnorm"]
    losses = group.tuned()
    assert group.learning_rate == min(losses, key=losses.get) == 0.02
    assert executor.jobs.count("rmsnorm, learning rate 0.02, seed 0") == 1
    text = (folder.path / "report" / "report.md").read_text()
    assert "NOTE: the best learning rate is at the edge of the grid for rmsnorm." in text
    assert f"{losses[0.02]:.3f} *" in text


def test_a_test_set_is_looked_at_by_compared_models_alone(here, monkeypatch):  # noqa: F811
    started, call = [], eval.study.jobs.call

    def counting(words, job, stopping):
        started.append(words[words.index("-m") + 1])
        return call(words, job, stopping)

    monkeypatch.setattr(eval.study.jobs, "call", counting)
    folder, _, lines = here(study(suites=["sva_simple"], metric="sva_simple", scoring={"limit": 4}, seeds=[0, 1]))
    groups = report(folder)
    scored = {path.parents[4].name + path.parents[3].name for path in folder.path.rglob("scores.json")}
    assert len(scored) == 2, "the best learning rate of each norm"
    # Two learning rates and another seed of each norm; what was trained for tuning is not trained again to be scored.
    assert (started.count("train_lm"), started.count("eval")) == (6, 4)
    assert [len(group.values("sva_simple")) for group in groups.values()] == [2, 2]
    text = (folder.path / "report" / "report.md").read_text()
    assert "SMOKE" in text
    assert "higher is better" in text
    assert any("sva_simple" in line for line in lines)


def test_bits_per_byte_are_better_when_lower(here, short_novel):  # noqa: F811
    folder, _, _ = here(
        study(norms=["rmsnorm", HANDICAPPED], suites=["austen_test"], metric="austen_test", learning_rates=[0.02])
    )
    found = report(folder)["handicapped"]
    assert found.paired.mean > 0
    assert "lower is better" in (folder.path / "report" / "report.md").read_text()
    assert (folder.path / "report" / "verdicts.tex").read_text().startswith(r"\begin{table}")


def final_of(folder, name, seed):
    cell = next(
        cell
        for group in Folder.open(folder.path).groups()  # of its own: a Folder reads a training that has ended once
        for cell in group.cells()
        if group.is_compared(cell) and (cell.arm, cell.seed) == (name, seed)
    )
    return folder.path / cell.folder / "run"


def other_batches(rows):
    rows[3]["batch_sha"] = "0" * 16


UNEQUAL = [
    ("metrics.jsonl", other_batches, "batches differ from step 4 on: batch_sha is 0000000000000000"),
    ("metrics.jsonl", lambda rows: rows[-1].update(tokens=7), "tokens differ: 7, the baseline's"),
    ("environment.json", {"init_sha": "f" * 64}, "initial values of the shared parameters differ: init_sha is ffff"),
    ("environment.json", {"train_sha": "f" * 64}, "training text differ: train_sha"),
    ("environment.json", {"num_processes": 2}, "processes differs: 2, the baseline's 1"),
    ("config.yaml", {"weight_decay": 0.3}, "weight_decay differs: 0.3, the baseline's 0.1"),
]


def test_a_pair_that_is_not_equal_is_refused_by_name(here, tmp_path):  # noqa: F811
    whole, _, _ = here(study(norms=["rmsnorm", "layernorm", "ibnorm_t"], seeds=[0, 1], learning_rates=[0.02]))
    for number, (file, change, why) in enumerate(UNEQUAL):
        folder = Folder.open(Path(shutil.copytree(whole.path, tmp_path / f"copy{number}")))
        change = change if callable(change) else lambda content, new=change: content.update(new)
        rewrite(final_of(folder, "layernorm", 1) / file, change)
        groups = report(folder)
        assert groups["layernorm"].verdict == REFUSED
        assert list(groups["layernorm"].refused) == ["seed 1"]
        assert groups["layernorm"].refused["seed 1"].startswith(why)
        assert groups["layernorm"].paired is None
        assert groups["ibnorm_t"].paired.n == 2
        text = (folder.path / "report" / "report.md").read_text()
        assert f"REFUSED: layernorm, seed 1: {why}" in text
        assert "| refused (seed 1) |" in text


@pytest.mark.parametrize(("patience", "why"), [(10, "of 6 steps skipped"), (2, "not finite at step 3")])
def test_a_training_that_diverges_is_a_result_and_not_dropped(here, patience, why):  # noqa: F811
    wild = {"norm": "rmsnorm", "name": "wild", "learning_rate_scale": 1e30}
    plan = study(
        norms=["rmsnorm", wild], seeds=[0, 1], learning_rates=[0.02], set={**TINY["set"], "max_skipped_steps": patience}
    )
    folder, executor, lines = here(plan)
    groups = report(folder)
    assert groups["wild"].verdict == DIVERGED
    assert groups["rmsnorm"].verdict == BASELINE
    assert any("diverged" in line for line in lines)
    text = (folder.path / "report" / "report.md").read_text()
    assert "diverged: wild" in text
    assert "| wild, learning rate 2e+28, seed 0 | diverged | " in text
    assert why in text
    _, executor, _ = here(plan)
    assert executor.jobs == [], "a result is not tried again"


def test_one_diverged_seed_takes_the_verdict_from_the_others(here):  # noqa: F811
    folder, _, _ = here(study(seeds=[0, 1, 2], learning_rates=[0.02]))
    rewrite(final_of(folder, "layernorm", 2) / "metrics.jsonl", lambda rows: rows[-1].update(eval_loss=5.7))
    group = report(Folder.open(folder.path))["layernorm"]
    assert (group.verdict, group.paired) == (DIVERGED, None)
    assert "diverged (1 of 3 seeds)" in (folder.path / "report" / "report.md").read_text()


def test_a_learning_rate_that_diverges_is_not_chosen(here):  # noqa: F811
    folder, _, _ = here(study(norms=["rmsnorm"], seeds=[0], learning_rates=[1e28, 0.02]))
    group = report(folder)["rmsnorm"]
    assert group.learning_rate == 0.02
    assert group.tuned()[1e28] is None
    assert "| diverged | " in (folder.path / "report" / "report.md").read_text()


def test_a_failed_training_is_reported_and_tried_again(here, monkeypatch):  # noqa: F811
    plan = study(seeds=[0, 1], learning_rates=[0.02])
    call = eval.study.jobs.call

    def failing(words, job, stopping):
        if "layernorm" in words and "seed=1" in str(job.folder):
            return 1, "RuntimeError: out of memory"
        return call(words, job, stopping)

    with monkeypatch.context() as patch:
        patch.setattr(eval.study.jobs, "call", failing)
        folder, _, lines = here(plan)
    assert any(
        line.endswith("layernorm, learning rate 0.02, seed 1: failed: RuntimeError: out of memory") for line in lines
    )
    groups = report(folder)
    assert groups["layernorm"].verdict == FAILED
    assert groups["layernorm"].paired is None
    assert "RuntimeError: out of memory" in (folder.path / "report" / "report.md").read_text()
    folder, executor, _ = here(plan)
    assert executor.jobs == ["layernorm, learning rate 0.02, seed 1"]
    assert report(folder)["layernorm"].paired.n == 2


def test_a_baseline_that_failed_leaves_no_verdicts(here):  # noqa: F811
    folder, _, _ = here(study(seeds=[0, 1], learning_rates=[0.02]))
    rewrite(final_of(folder, "rmsnorm", 1) / "metrics.jsonl", lambda rows: rows[-1].update(eval_loss=1e3))
    groups = report(Folder.open(folder.path))
    assert (groups["rmsnorm"].verdict, groups["layernorm"].verdict) == (DIVERGED, NO_BASELINE)


def test_a_study_that_is_not_done_says_so(here, capsys):  # noqa: F811
    folder, _, _ = here(study(seeds=[0, 1], learning_rates=[0.02]), room=3)
    groups = report(folder)
    assert [group.verdict for group in groups.values()] == [BASELINE, UNFINISHED]
    capsys.readouterr()
    print_status(folder)
    said = capsys.readouterr().out
    assert "3 of 4 trainings have ended" in said
    assert "no `study run` is at work here" in said
    fresh, _, _ = here(study(), "fresh", room=0)
    with pytest.raises(UserError, match="no training yet that has ended"):
        report(fresh)


def test_one_seed_gets_no_verdict(here):  # noqa: F811
    folder, _, _ = here(study(seeds=[3], learning_rates=[0.02]))
    assert report(folder)["layernorm"].verdict == ONE_SEED


def test_a_study_grows_and_says_so(here):  # noqa: F811
    here(study(seeds=[0, 1], learning_rates=[0.02]))
    plan = study(norms=["rmsnorm", "layernorm", "dyt"], seeds=[0, 1, 2], learning_rates=[0.02])
    folder, executor, _ = here(plan)
    assert len(executor.jobs) == 2 + 3
    report(folder)
    text = (folder.path / "report" / "report.md").read_text()
    assert "after it began with 2 norms, learning rates 0.02, seeds 0, 1" in text


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"set": {"max_steps": 7}}, "another recipe"),
        ({"seeds": [0]}, "seeds 1"),
        (
            {"norms": ["rmsnorm", {"norm": "layernorm", "kwargs": {"bias": False}, "name": "layernorm"}]},
            "another norm 'layernorm'",
        ),
        ({"threads": 2}, "other threads"),
        ({"baseline": "layernorm"}, "other baseline"),
    ],
)
def test_what_a_study_has_does_not_change(here, fields, what):  # noqa: F811
    base = {"seeds": [0, 1], "learning_rates": [0.02]}
    folder, _, _ = here(study(**base), room=1)
    before = (folder.path / "study.json").read_bytes()
    with pytest.raises(UserError, match=rf"holds a study with .*{what}"):
        here(study(**{**base, **fields}))
    assert (folder.path / "study.json").read_bytes() == before


def test_the_whole_comparison_is_made_under_each_condition(here):  # noqa: F811
    conditions = {"narrow": {"model.hidden_size": 16}, "wide": {"model.hidden_size": 32}}
    folder, _, _ = here(study(conditions=conditions, seeds=[0, 1], learning_rates=[0.02]))
    groups = report(folder)
    assert list(groups) == ["narrow: rmsnorm", "narrow: layernorm", "wide: rmsnorm", "wide: layernorm"]
    parameters = {name: group.runs()[0].environment["parameters"] for name, group in groups.items()}
    assert parameters["narrow: rmsnorm"] < parameters["wide: rmsnorm"]
    assert [group.verdict for group in groups.values()].count(BASELINE) == 2


def test_the_report_of_a_sweep_has_its_curve_and_its_map(here, figures):  # noqa: F811
    norms = ["rmsnorm", {"norm": "ibnorm_t", "sweep": {"lam": [1, 2, 4]}}]
    folder, _, _ = here(study(norms=norms, seeds=[0, 1]))
    report(folder)
    written = {path.name: path for path in (folder.path / "report").iterdir()}
    pictures = {"forest.png", "losses.png", "cost.png", "lambda.png", "stability.png"}
    files = {
        "report.md",
        "report.html",
        "verdicts.csv",
        "verdicts.tex",
        "cells.csv",
        "curves.csv",
        "study.yaml",
        "recipe-recipe.yaml",
    }
    assert pictures | files == set(written)
    assert read_study(str(written["study.yaml"])).arms == folder.study.arms, "what was asked can be asked again"
    page = written["report.html"].read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "http" not in page.replace("http-equiv", "")
    (losses,) = (each for each in figures if each.axes[0].get_title(loc="left").startswith("training loss"))
    assert losses.axes[1].get_title(loc="left") == "validation loss, difference from rmsnorm, nats per token"
    assert losses.axes[1].lines[0].get_ydata().tolist() == [0.0, 0.0], "the baseline's from itself"
    rows = list(csv.DictReader(written["curves.csv"].open()))
    best = {row["norm"] for row in rows} - {"rmsnorm"}
    assert len(best) == 1, "of a sweep the best λ"
    ends = [float(row["loss"]) for row in rows if row["kind"] == "validation" and row["step"] == "6"]
    shown = (best.pop(), "rmsnorm")
    group = {name: each for name, each in report(folder).items() if name in shown}
    assert sorted(ends) == sorted(value for each in group.values() for value in each.values("eval_loss").values())
    rows = list(csv.DictReader(written["cells.csv"].open()))
    assert len(rows) == 4 * (2 + 1)
    assert all(len({row["init_sha"] for row in rows if row["seed"] == seed}) == 1 for seed in "01")
    assert len({row["batches_sha"] for row in rows}) == 2, "one order of the data for each seed"


def test_a_run_dir_that_another_run_trains_in_is_waited_for(here, monkeypatch):  # noqa: F811
    """As after a `study run` that was killed: its trainings live on."""
    from filelock import FileLock

    folder, _, _ = here(study(norms=["rmsnorm"], seeds=[0], learning_rates=[0.02]), room=0)
    run_dir = folder.path / "cells/rmsnorm/lr=0.02/seed=0/run"
    run_dir.mkdir(parents=True)
    held = FileLock(run_dir / ".lock")
    held.acquire()
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            held.release()

    monkeypatch.setattr(eval.study.jobs.time, "sleep", nap)
    _, executor, _ = here(study(norms=["rmsnorm"], seeds=[0], learning_rates=[0.02]))
    assert naps[:3] == [eval.study.jobs.POLL] * 3
    assert (run_dir / "final").exists()
    assert len(executor.jobs) == 1


@pytest.mark.slow
def test_a_search_finds_a_lam_and_confirms_it_on_fresh_seeds(here):  # noqa: F811
    folder, executor, _ = here(searching())
    winner = folder.winner("ibnorm_t searched")
    trials = winner["trials"]
    assert len(trials) == 4
    assert "pruned" in [trial["state"] for trial in trials]
    complete = [trial for trial in trials if trial["state"] == "trained"]
    assert winner["loss"] == min(trial["loss"] for trial in complete)
    assert 0.5 <= winner["lam"] <= 8
    group = report(folder)["ibnorm_t searched"]
    assert group.arm.lam == winner["lam"]
    assert sorted(group.finals) == [0, 1]
    assert "had 4 trials, and other norms 2" in (folder.path / "report" / "report.md").read_text()
    # Interrupted after two trials, the search goes on with the ones it would have made.
    forget(folder, 2, 3)
    folder, executor, _ = here(searching())
    assert [name.partition(",")[2][:8] for name in executor.jobs] == [" trial 3", " trial 4"]
    assert folder.winner("ibnorm_t searched")["trials"] == trials


def searching(**fields):
    search = [{"norm": "ibnorm_t", "lam": [0.5, 8], "trials": 4}]
    fast = {"max_steps": 12, "eval_every": 2, "log_with": []}
    return study(
        **{"norms": ["rmsnorm"], "search": search, "tuning_seeds": [9], "seeds": [0, 1], "set": fast, **fields}
    )


def forget(folder, *numbers):
    place = folder.path / "search" / "ibnorm_t_searched"
    (place / "winner.json").unlink()
    for number in numbers:
        (place / f"trial-00{number}" / "result.json").unlink()


def test_a_search_keeps_to_what_its_trials_were(here, monkeypatch):  # noqa: F811
    """With another grid the sampler draws other values; those of trials that have ended are in their files."""
    import optuna

    studies, create = [], optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **given: studies.append(create(**given)) or studies[-1])
    folder, _, _ = here(searching())
    trials = folder.winner("ibnorm_t searched")["trials"]
    forget(folder, 3)
    folder, _, _ = here(searching(learning_rates=[0.001, 0.02, 0.01]))
    winner = folder.winner("ibnorm_t searched")
    assert winner["trials"][:3] == trials[:3]
    assert (winner["lam"], winner["loss"]) in [(trial["lam"], trial["loss"]) for trial in winner["trials"]]
    told = [(trial.params["lam"], trial.params["learning_rate"]) for trial in studies[-1].trials]
    assert told == [(trial["lam"], trial["learning_rate"]) for trial in winner["trials"]], "what Optuna learns from"


def test_a_search_in_which_all_diverge_is_a_result(here, capsys):  # noqa: F811
    folder, _, lines = here(searching(learning_rates=[1e28]))
    assert any("best of 4 trials: none, all diverged" in line for line in lines)
    groups = report(folder)
    assert groups["ibnorm_t searched"].verdict == DIVERGED
    capsys.readouterr()
    print_status(folder)
    assert "ibnorm_t searched: 4 of 4 trials have ended" in capsys.readouterr().out


def test_a_study_in_which_all_diverge_has_a_report(here):  # noqa: F811
    folder, _, _ = here(study(norms=["rmsnorm", "layernorm"], seeds=[0], learning_rates=[1e28]))
    assert {group.verdict for group in report(folder).values()} == {DIVERGED}


def test_a_failure_that_was_mended_by_hand_is_none(here):  # noqa: F811
    fields = {"seeds": [0, 1], "learning_rates": [0.02]}
    folder, _, _ = here(study(**fields))
    cell = final_of(folder, "layernorm", 1).parent
    (cell / "failure.json").write_text(json.dumps({"problem": "killed by SIGKILL", "done": "run/final"}))
    assert report(Folder.open(folder.path))["layernorm"].paired.n == 2
    folder, _, _ = here(study(**fields, suites=["sva_simple"], metric="eval_loss"), room=0)
    assert report(folder)["layernorm"].verdict == UNFINISHED, "not failed: it has only to be scored"


def test_a_command_that_dies_when_all_is_done_has_done_it(here, monkeypatch):  # noqa: F811
    call = eval.study.jobs.call

    def dying(words, job, stopping):
        call(words, job, stopping)
        return 1, "terminate called without an active exception"

    monkeypatch.setattr(eval.study.jobs, "call", dying)
    folder, _, lines = here(study(norms=["rmsnorm"], seeds=[0], learning_rates=[0.02]))
    assert "failed" not in lines[0]
    assert report(folder)["rmsnorm"].verdict == BASELINE


def test_a_command_that_does_nothing_has_failed(here, monkeypatch):  # noqa: F811
    monkeypatch.setattr(eval.study.jobs, "call", lambda words, job, stopping: (0, "nothing was said"))
    _, _, lines = here(study(norms=["rmsnorm"], seeds=[0], learning_rates=[0.02]))
    assert lines == ["[0/1] rmsnorm, learning rate 0.02, seed 0: failed: nothing was said"]


def test_a_job_whose_machine_is_lost_has_failed(here, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.setattr(Here, "submit", lambda self, job: self.jobs.append(job.name) or failed(job))
        folder, _, lines = here(study(norms=["rmsnorm"], seeds=[0], learning_rates=[0.02]))
    assert lines == ["[0/1] rmsnorm, learning rate 0.02, seed 0: failed: RuntimeError: the worker died"]
    assert "RuntimeError: the worker died" in (folder.path / "cells/rmsnorm/lr=0.02/seed=0/failure.json").read_text()


def failed(job):
    future = Future()
    future.set_exception(RuntimeError("the worker\ndied"))
    return future


def test_a_run_that_is_not_the_cells_is_not_taken_for_it(here):  # noqa: F811
    folder, _, _ = here(study(seeds=[0, 1], learning_rates=[0.02]))
    rewrite(final_of(folder, "layernorm", 1) / "config.yaml", lambda content: content.update(learning_rate=7.0))
    groups = report(Folder.open(folder.path))
    assert groups["layernorm"].verdict == FAILED
    text = (folder.path / "report" / "report.md").read_text()
    assert "the run here is another one: learning_rate is 7.0, must be 0.02" in text


def test_what_tuned_must_be_equal_too(here):  # noqa: F811
    folder, _, _ = here(study(seeds=[1, 2], tuning_seeds=[0]))
    rewrite(folder.path / "cells/layernorm/lr=0.001/seed=0/run/metrics.jsonl", other_batches)
    group = report(Folder.open(folder.path))["layernorm"]
    assert group.verdict == REFUSED
    assert list(group.refused) == ["tuning at 0.001"]


def test_scores_of_another_manner_are_not_compared(here):  # noqa: F811
    plan = {"suites": ["sva_simple"], "metric": "sva_simple", "seeds": [0], "learning_rates": [0.02]}
    folder, _, _ = here(study(**plan, scoring={"limit": 4}))
    place = final_of(folder, "layernorm", 0).parent / "scores" / "sva_simple"
    rewrite(place / "manifest.json", lambda content: content["identity"]["model"].update(dtype="bfloat16"))
    group = report(folder)["layernorm"]
    assert group.refused["seed 0"] == ("sva_simple was scored with dtype 'bfloat16', for the baseline with 'float32'")
    # Flags of scoring may be mended; what was scored stays as it was.
    folder, executor, _ = here(study(**plan, scoring={"limit": 4, "batch_size": 16}))
    assert executor.jobs == []


def test_what_an_arm_has_of_its_own_is_said(here):  # noqa: F811
    norms = ["rmsnorm", {"norm": "layernorm", "set": {"weight_decay": 0.0}}]
    folder, _, _ = here(study(norms=norms, seeds=[0, 1], learning_rates=[0.02]))
    assert report(folder)["layernorm"].paired.n == 2
    assert "NOTE: on purpose, layernorm has weight_decay = 0.0." in (folder.path / "report" / "report.md").read_text()


def test_what_has_no_hash_is_not_said_to_be_equal(here):  # noqa: F811
    folder, _, _ = here(study(seeds=[0, 1], learning_rates=[0.02]))
    for path in folder.path.rglob("environment.json"):
        rewrite(path, lambda content: content.update(train_sha=None))
    assert report(Folder.open(folder.path))["layernorm"].paired.n == 2
    text = (folder.path / "report" / "report.md").read_text()
    assert "equal initial values of the shared parameters, tokenizer, validation text, every batch" in text
    assert "NOTE: of training text there is no hash" in text


def test_sweeps_of_one_norm_do_not_hide_each_other(here):  # noqa: F811
    sweep = {"standardize": ["layer", "rms"], "lam": [0, 1, 2]}
    folder, _, _ = here(
        study(norms=["rmsnorm", {"norm": "ibnorm_t", "sweep": sweep}], seeds=[0], learning_rates=[0.02]), room=0
    )
    titles = sweeps_of(folder.groups())
    assert {title: [group.arm.lam for group in groups] for title, groups in titles.items()} == {
        "ibnorm_t standardize=layer": [0, 1, 2],
        "ibnorm_t standardize=rms": [0, 1, 2],
    }


def test_a_plan_with_nothing_trained_can_be_mended(here):  # noqa: F811
    here(study(), room=0)
    other = {**TINY["set"], "max_steps": 7}
    folder, _, _ = here(study(set=other, norms=["dyt", "rmsnorm"]), room=0)
    assert "max_steps: 7" in folder.recipe("").read_text()
    assert len(folder.record()["history"]) == 1


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read"), ("[]", "got .., must be"), ("{}", "has no study")]
)
def test_damaged_files_are_told_in_a_line(here, text, message):  # noqa: F811
    folder, _, _ = here(study(seeds=[0, 1], learning_rates=[0.02]), room=1)
    cell = folder.path / "cells/rmsnorm/lr=0.02/seed=0"
    if text == "{":
        (cell / "failure.json").write_text(text)
        with pytest.raises(UserError, match=r"failure.json cannot be read"):
            report(Folder.open(folder.path))
        (cell / "failure.json").unlink()
    (folder.path / "study.json").write_text(text)
    with pytest.raises(UserError, match=rf"study.json.* {message}"):
        Folder.open(folder.path)
    with pytest.raises(UserError, match=rf"study.json.* {message}"):
        here(study(seeds=[0, 1], learning_rates=[0.02]))


def test_status_where_nothing_was_begun_and_where_another_process_works(here, capsys):  # noqa: F811
    folder, _, _ = here(study(), room=0)
    (folder.path / "running.json").unlink()
    with folder.lock():
        print_status(Folder.open(folder.path))
    assert "running now: nothing" in capsys.readouterr().out


def test_a_learning_rate_with_a_seed_that_diverged_has_no_mean():
    first, second = (Training(TRAINED, Run("", {}, {}, [{"eval_loss": loss}], None)) for loss in (2.0, 4.0))
    lost = Training(DIVERGED, None, "learnt nothing")
    tried = {0.1: [first, lost], 0.2: [first, second], 0.3: [lost, lost]}
    assert mean_losses(tried) == {0.1: None, 0.2: 3.0, 0.3: None}
