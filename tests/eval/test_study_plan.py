"""The file of a study: what it says, what follows from it, and what is wrong with it in one line."""

import datetime
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from studying import ask, study

import eval.study.folder
from eval.study import shipped_studies
from eval.study.folder import Folder
from eval.study.plan import Cell, flag_words, read_study, study_from
from hf_ibnorm.base.errors import UserError
from train_lm.config import build_model_config, read_command_line

PAGE = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")


def names(found):
    return [arm.name for arm in found.arms]


def test_a_sweep_is_an_arm_for_each_combination():
    found = study(
        norms=["rmsnorm", {"norm": "IBNorm-T", "sweep": {"lam": [1, 4], "unit": ["raw", "mean_abs"]}, "name": "T"}]
    )
    assert names(found) == [
        "rmsnorm",
        *("T lam=1 unit=raw", "T lam=1 unit=mean_abs", "T lam=4 unit=raw", "T lam=4 unit=mean_abs"),
    ]
    assert found.arms[-1].norm == "ibnorm_t"
    assert found.arms[-1].kwargs["lam"] == 4.0
    assert len({arm.family for arm in found.arms[1:]}) == 2


def test_what_changes_nothing_may_be_empty():
    found = study(set={}, scoring={}, norms=["rmsnorm", {"norm": "dyt", "kwargs": {}, "overrides": [], "set": {}}])
    assert names(found) == ["rmsnorm", "dyt"]
    assert set(study(conditions={"as it is": {}, "wide": {"block_size": 64}}).conditions) == {"as it is", "wide"}


def test_options_are_in_the_name_where_none_is_given():
    assert names(study(norms=["rmsnorm", {"norm": "ibnorm_l", "kwargs": {"lam": 2}}])) == ["rmsnorm", "ibnorm_l lam=2"]


def test_every_option_is_kept_so_that_a_new_default_changes_nothing():
    kwargs = study(norms=["rmsnorm", "ibnorm_t"]).arms[1].kwargs
    assert {"lam", "unit", "standardize", "order"} <= kwargs.keys()
    assert "eps" not in kwargs, "the model's own"


@pytest.mark.parametrize(
    ("family", "stock"), [("llama", "rmsnorm"), ("gpt2", "layernorm"), ("qwen3", "rmsnorm"), ("opt", "layernorm")]
)
def test_the_baseline_is_the_norm_of_the_stock_model(tmp_path, monkeypatch, family, stock):
    monkeypatch.setattr(eval.study.folder, "ask", ask)
    norms = ["ibnorm_l", {"norm": "layernorm", "name": "its own"}, {"norm": "rmsnorm", "name": "another"}]
    folder = Folder.begin(study(norms=norms, set={"model": {"model_type": family}}), tmp_path / "study", [])
    assert folder.study.arms[[arm.name for arm in folder.study.arms].index(folder.study.baseline)].norm == stock
    assert Folder.open(tmp_path / "study").study == folder.study
    with pytest.raises(UserError, match=rf"baseline: is missing, and {stock}, the norm of {family}, is none of norms"):
        Folder.begin(study(norms=["dyt"], set={"model": {"model_type": family}}), tmp_path / "other", [])


def test_one_seed_tunes_where_none_is_named():
    assert study(seeds=[4, 5]).tuning_seeds == (4,)


def test_numbers_without_a_point_are_numbers():
    """YAML takes 1e-3 for text."""
    assert study(learning_rates=["1e-3", 2.0e-3]).learning_rates == (0.001, 0.002)


def test_cells_of_one_arm_differ_in_their_folders():
    found = study(conditions={"wide": {"block_size": 64}, "narrow": {"block_size": 32}})
    cells = [
        Cell(condition, arm.name, rate, seed)
        for condition in found.conditions
        for arm in found.arms
        for rate in found.learning_rates
        for seed in found.seeds
    ]
    assert len({cell.folder for cell in cells}) == len(cells) == 24
    assert str(cells[0].folder) == "cells/wide/rmsnorm/lr=0.001/seed=0"


def test_a_plan_comes_back_from_json():
    search = {"norm": "ibnorm_t", "lam": [1, 4], "trials": 3}
    found = study(norms=["rmsnorm", {"norm": "ibnorm_l", "sweep": {"lam": [1, 4]}}], search=[search], tuning_seeds=[9])
    assert study_from(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norms": None}, "norms: is missing; needed are recipe, norms, learning_rates, seeds"),
        ({"seed": [1]}, "study: unknown field 'seed' (did you mean 'seeds'?)"),
        ({"norms": ["rmsnorm", "ibnorm_x"]}, "norms[1].norm: unknown norm 'ibnorm_x'"),
        ({"norms": [{"norm": "ibnorm_t", "kwargs": {"lamb": 1}}]}, "norms[0].kwargs.lamb: ibnorm_t has no such option"),
        ({"norms": [{"norm": "ibnorm_t", "sweep": {"lam": [1, -1]}}]}, "norms[0].kwargs.lam: got -1"),
        (
            {"norms": [{"norm": "ibnorm_t", "sweep": {"lam": 1}}]},
            "norms[0].sweep: got {'lam': 1}, must be a mapping, each value a list",
        ),
        ({"norms": ["rmsnorm", "rmsnorm"]}, "norms: 'rmsnorm' is there more than once, or too like another name"),
        ({"norms": []}, "norms: got an empty list"),
        (
            {"norms": ["rmsnorm", {"norm": "ibnorm_t", "sweep": {"lam": [1, 2], "unit": []}}]},
            "norms[1].sweep.unit: got an empty list, must have one or more",
        ),
        ({"norms": [{"norm": "ibnorm_t", "sweep": {}}]}, "norms[0].sweep: got an empty mapping"),
        ({"conditions": {}}, "conditions: got an empty mapping, must have one or more"),
        ({"search": []}, "search: got an empty list"),
        ({"suites": []}, "suites: got an empty list"),
        ({"seeds": []}, "seeds: got an empty list"),
        ({"tuning_seeds": []}, "tuning_seeds: got an empty list"),
        ({"suites": ["embedded"], "scoring": {"skip": []}}, "scoring.skip: got an empty list"),
        (
            {"suites": ["embedded"], "scoring": {"limit": None}},
            "scoring: got {'limit': None}, must be a mapping, each value text",
        ),
        (
            {"norms": ["rmsnorm", {"norm": "dyt", "name": "rms norm"}, {"norm": "dyt", "name": "rms/norm"}]},
            "norms: 'rms norm' is there more than once",
        ),
        ({"norms": [{"kwargs": {}}]}, "norms[0].norm: is missing"),
        ({"norms": [3]}, "norms[0]: got 3, must be a mapping"),
        ({"norms": "rmsnorm"}, "norms: got 'rmsnorm', must be a list"),
        (
            {"baseline": "rmsnrom"},
            "baseline: got 'rmsnrom', must be one of norms: rmsnorm, layernorm (did you mean 'rmsnorm'?)",
        ),
        ({"learning_rates": [0]}, "learning_rates: got [0], must be a list, each item a number > 0"),
        ({"learning_rates": []}, "learning_rates: got an empty list, must have one or more"),
        ({"learning_rates": [0.1, 0.1]}, "learning_rates: got 0.1 more than once"),
        ({"seeds": [0, 0]}, "seeds: got 0 more than once"),
        ({"seeds": [0.5]}, "seeds: got [0.5], must be a list, each item a whole number >= 0"),
        ({"tuning_seeds": 0}, "tuning_seeds: got 0, must be a list"),
        ({"threads": 1.5}, "threads: got 1.5, must be a whole number >= 1"),
        ({"learning_rates": [0.1234567, 0.12345671]}, "learning_rates: got 0.123457 more than once"),
        ({"set": {"model": {"norm_type": "dyt"}}}, "set: got 'model.norm_type', which is the study's own"),
        ({"set": {"corpus": datetime.date(2026, 1, 1)}}, "set.corpus: got a date; put it in quotes"),
        ({"set": {"seed": 3}}, "set: got 'seed', which is the study's own"),
        ({"conditions": {"a": {"run_dir": "x"}}}, "conditions.a: got 'run_dir', which is the study's own"),
        ({"metric": "austen_test"}, "metric: got 'austen_test', but there are no suites"),
        ({"scoring": {"suite": "v1"}}, "scoring: unknown field 'suite'"),
        ({"threads": 0}, "threads: got 0"),
        (
            {"search": [{"norm": "ibnorm_t", "lam": [4, 1], "trials": 3}], "tuning_seeds": [9]},
            "search[0].lam: got [4, 1]",
        ),
        ({"search": [{"norm": "ibnorm_t", "lam": [1, 4]}]}, "search[0].trials: is missing"),
        (
            {"search": [{"norm": "dyt", "lam": [1, 4], "trials": 3}], "tuning_seeds": [9]},
            "search[0].kwargs.lam: dyt has no",
        ),
        ({"search": [{"norm": "ibnorm_t", "lam": [1, 4], "trials": 3}]}, "seeds: got 0, which is one of tuning_seeds"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(fields, message):
    with pytest.raises((ValueError, TypeError)) as error:
        study(**fields)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"study: got 'quik', no such file; shipped are .*quick.*did you mean 'quick'"):
        read_study("quik")
    (tmp_path / "broken.yaml").write_text("norms: [")
    with pytest.raises(UserError, match=r"broken.yaml cannot be read"):
        read_study(str(tmp_path / "broken.yaml"))


@pytest.mark.parametrize("name", shipped_studies())
def test_every_training_of_a_shipped_study_is_one_that_train_lm_takes(name):
    found = read_study(name)
    for condition in found.conditions.values():
        for arm in found.arms:
            settings = {**found.settings, **condition, **arm.flags(), "learning_rate": 0.1, "run_dir": "unused"}
            config = read_command_line(["--config", found.recipe, *flag_words(settings)])
            built = build_model_config(config)
            assert built.norm_type == arm.norm
            assert {key: built.norm_kwargs[key] for key in arm.kwargs} == arm.kwargs


@pytest.mark.parametrize("name", shipped_studies())
def test_the_number_of_trainings_is_what_the_page_says(name):
    found = read_study(name)
    for_each = len(found.learning_rates) * len(found.tuning_seeds) + len(set(found.seeds) - set(found.tuning_seeds))
    searched = sum(search.trials + len(found.seeds) for search in found.searches)
    (row,) = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{name}`" in line]
    assert row.split("|")[-2].strip(" ≤") == str(len(found.conditions) * len(found.arms) * for_each + searched)


def test_the_shipped_studies_are_what_the_readme_says():
    quick = read_study("quick")
    assert {arm.norm for arm in quick.arms} == {
        *("rmsnorm", "layernorm", "ibnorm_s", "ibnorm_l", "ibnorm_t", "layernormalnorm", "dyt")
    }
    assert (len(quick.arms), len(quick.learning_rates), quick.seeds, quick.baseline) == (8, 4, (0, 1, 2), "rmsnorm")
    assert read_study("quick-gpt2").baseline == "layernorm"
    assert read_study("quick-gpt2").settings["model.model_type"] == "gpt2"


def test_the_recipe_is_resolved_once_and_kept(tmp_path):
    """By asking train_lm, in a process of its own."""
    folder = Folder.begin(study(set={"max_steps": 7, "model": {"hidden_size": 48}}), tmp_path / "study", [])
    text = folder.recipe("").read_text()
    assert "max_steps: 7" in text
    assert "hidden_size: 48" in text
    assert "block_size: 32" in text
    assert "norm_type" not in text
    assert "seed" not in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"set": {"max_step": 7}}, r"recipe: .*max_step\b.*max_steps"),
        ({"set": {"max_steps": -5}}, "recipe: max_steps: got -5"),
        ({"conditions": {"a": {"model.num_attention_heads": 7}}}, "recipe: model.num_attention_heads: got 7"),
        ({"norms": ["rmsnorm", {"norm": "dyt", "overrides": [["layers.9.*", "dyt"]]}]}, "recipe: .*matches no site"),
        ({"norms": ["rmsnorm", {"norm": "dyt", "set": {"weight_decay": -1}}]}, "recipe: weight_decay: got -1"),
        ({"suites": ["embedded"], "metric": "mmlu"}, "metric: got 'mmlu', must be eval_loss or one of .*austen_test"),
        ({"suites": ["embedded"], "scoring": {"limit": "abc"}}, "scoring: .*limit.*'abc'"),
        (
            {"suites": ["embedded"], "metric": "austen_test", "scoring": {"skip": ["austen_test"]}},
            "scoring: skip leaves",
        ),
        ({"suites": ["embedded"], "scoring": {"skip": ["sva_simpl"]}}, "scoring: skip: got 'sva_simpl', allowed are"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr(eval.study.folder, "ask", ask)
    with pytest.raises(UserError, match=message):
        Folder.begin(study(**fields), tmp_path / "study", [])
    assert not (tmp_path / "study").exists()
