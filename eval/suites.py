"""What a suite is made of, defined once: tasks, shots, metric, aggregation, chance levels, and where the items are."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_ibnorm.data import load_corpus

MULTIPLE_CHOICE = (
    "sva_simple",
    "sva_nounpp",
    "sva_linzen",
    "cause_and_effect",
    "phrase_relatedness",
    "human_organs_senses",
)
ROLLING = {"austen_test": "austen"}


@dataclass(frozen=True)
class Benchmark:
    """One row of a score table.

    Args:
        name: the task or group of lm-eval, and the key in `scores.json`.
        title: how a leaderboard heads its column.
        tasks: the tasks it must consist of; any other set is an error.
        metric: of lm-eval's metrics the one that counts; "ifeval" is the mean of the strict accuracies of prompts and
            of instructions, "bits_per_byte" is better when lower.
        filter: of lm-eval's filters the one that counts.
        mean: "size" lets every item count the same, "task" every task.
        bounds: the score of guessing, subtracted when normalizing: one for the benchmark, or one for each task (each
            task is normalized first then, and the average taken); None is the mean of 1/choices over its items.
        items: how many the leaderboard has; with another number a score is not the leaderboard's.
        shots: examples in the prompt; asserted.
        set_shots: whether lm-eval has to be told; otherwise its own task files say so.
        also: further scores for `details`, as lm-eval names them: "metric,filter".
        folders: where the task files are: below lm-eval's own, or an absolute path.
        config: tasks of our own, which lm-eval takes as a dictionary.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    metric: str
    filter: str = "none"
    mean: str = "size"
    bounds: float | Mapping[str, float] | None = None
    items: int | None = None
    shots: int = 0
    set_shots: bool = False
    also: tuple[str, ...] = ()
    folders: tuple[str, ...] = field(default=(), repr=False)
    config: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def rolling(self) -> bool:
        """Whether whole documents are scored, in bits per byte."""
        return self.metric == "bits_per_byte"

    @property
    def key(self) -> str:
        """The metric as lm-eval's results name it."""
        return f"{self.metric},{self.filter}"


def embedded_rows(name: str) -> list[dict[str, Any]]:
    """The items of an embedded task: {"query", "choices", "gold", "cluster"}, or {"text"} for rolling ones."""
    if name in ROLLING:
        return [{"text": each} for text in load_corpus(ROLLING[name], "test") for each in passages(text)]
    text = resources.files("eval.tasks").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def passages(text: str, words: int = 300) -> list[str]:
    """A text in pieces of whole paragraphs, each as short as it can be with so many words; together they are the text.

    Each is an item of its own: a novel as one item would have no standard error, and nothing to pair.
    """
    found = [""]
    for paragraph in re.split(r"(?<=\n\n)(?!\n)", text):
        if len(found[-1].split()) >= words:
            found.append("")
        found[-1] += paragraph
    if len(found) > 1 and len(found[-1].split()) < words:  # the end of the text
        last = found.pop()
        found[-1] += last
    return found


def _embedded(name: str) -> Benchmark:
    """A task whose items are handed to lm-eval in memory, so that no dataset cache is involved."""

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(embedded_rows(name))}

    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "metadata": {"version": 2.0 if name in ROLLING else 1.0},  # 1: the novel as one item
    }
    if name in ROLLING:
        metric = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        config |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    else:
        metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        config |= {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "target_delimiter": " ",
        }
    return Benchmark(name, name, (name,), metric["metric"], config=config | {"metric_list": [metric]})


SUBJECTS = (
    "abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry "
    "college_computer_science college_mathematics college_medicine college_physics computer_security "
    "conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_european_history "
    "high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics "
    "high_school_microeconomics high_school_physics high_school_psychology high_school_statistics "
    "high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence "
    "logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes "
    "moral_scenarios nutrition philosophy prehistory professional_accounting professional_law "
    "professional_medicine professional_psychology public_relations security_studies sociology us_foreign_policy "
    "virology world_religions"
)

BBH_CHOICES = {
    2: "boolean_expressions causal_judgement formal_fallacies hyperbaton navigate snarks sports_understanding "
    "web_of_lies",
    3: "disambiguation_qa logical_deduction_three_objects tracking_shuffled_objects_three_objects",
    4: "temporal_sequences",
    5: "logical_deduction_five_objects penguins_in_a_table tracking_shuffled_objects_five_objects",
    6: "date_understanding movie_recommendation ruin_names salient_translation_error_detection",
    7: "logical_deduction_seven_objects tracking_shuffled_objects_seven_objects",
    11: "geometric_shapes",
    18: "reasoning_about_colored_objects",
    19: "object_counting",
}
BBH = {f"leaderboard_bbh_{name}": 1 / n for n, names in BBH_CHOICES.items() for name in names.split()}
MUSR = {"murder_mysteries": 1 / 2, "object_placements": 1 / 5, "team_allocation": 1 / 3}
MATH = ("algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra", "precalculus")

V1 = (
    Benchmark(
        "arc_challenge", "ARC", ("arc_challenge",), "acc_norm", items=1172, shots=25, set_shots=True, folders=("arc",)
    ),
    Benchmark(
        "hellaswag",
        "HellaSwag",
        ("hellaswag",),
        "acc_norm",
        items=10042,
        shots=10,
        set_shots=True,
        folders=("hellaswag",),
    ),
    Benchmark(
        "mmlu",
        "MMLU",
        tuple(f"mmlu_{subject}" for subject in SUBJECTS.split()),
        "acc",
        mean="task",
        bounds=1 / 4,
        items=14042,
        shots=5,
        set_shots=True,
        folders=("mmlu/default",),
    ),
    Benchmark("truthfulqa_mc2", "TruthfulQA", ("truthfulqa_mc2",), "acc", items=817, folders=("truthfulqa",)),
    Benchmark(
        "winogrande",
        "Winogrande",
        ("winogrande",),
        "acc",
        bounds=1 / 2,
        items=1267,
        shots=5,
        set_shots=True,
        folders=("winogrande",),
    ),
    Benchmark(
        "gsm8k",
        "GSM8K",
        ("gsm8k",),
        "exact_match",
        "strict-match",
        bounds=0.0,
        items=1319,
        shots=5,
        also=("exact_match,flexible-extract",),
        folders=("gsm8k",),
    ),
)

V2 = (
    Benchmark(
        "leaderboard_ifeval",
        "IFEval",
        ("leaderboard_ifeval",),
        "ifeval",
        bounds=0.0,
        items=541,
        also=("prompt_level_strict_acc,none", "inst_level_strict_acc,none"),
        folders=("leaderboard/ifeval",),
    ),
    Benchmark(
        "leaderboard_bbh",
        "BBH",
        tuple(BBH),
        "acc_norm",
        mean="task",
        bounds=BBH,
        items=5761,
        shots=3,
        folders=("leaderboard/bbh_mc",),
    ),
    Benchmark(
        "leaderboard_math_hard",
        "MATH Lvl 5",
        tuple(f"leaderboard_math_{name}_hard" for name in MATH),
        "exact_match",
        bounds=0.0,
        items=1324,
        shots=4,
        folders=("leaderboard/math",),
    ),
    Benchmark(
        "leaderboard_gpqa",
        "GPQA",
        tuple(f"leaderboard_gpqa_{name}" for name in ("diamond", "extended", "main")),
        "acc_norm",
        bounds=1 / 4,
        items=1192,
        folders=("leaderboard/gpqa",),
    ),
    Benchmark(
        "leaderboard_musr",
        "MuSR",
        tuple(f"leaderboard_musr_{name}" for name in MUSR),
        "acc_norm",
        mean="task",
        bounds={f"leaderboard_musr_{name}": bound for name, bound in MUSR.items()},
        items=756,
        folders=("leaderboard/musr",),
    ),
    Benchmark(
        "leaderboard_mmlu_pro",
        "MMLU-PRO",
        ("leaderboard_mmlu_pro",),
        "acc",
        bounds=1 / 10,
        items=12032,
        shots=5,
        folders=("leaderboard/mmlu_pro",),
    ),
)

SUITES: dict[str, tuple[Benchmark, ...]] = {
    "embedded": tuple(_embedded(name) for name in (*ROLLING, *MULTIPLE_CHOICE)),
    "v1": V1,
    "v2": V2,
}
DEFINED = {each.name: each for benchmarks in SUITES.values() for each in benchmarks}
AVERAGED = ("v1", "v2")
"""Suites whose benchmarks have a common mean; bits per byte and accuracies have none."""


def tasks_root() -> Path:
    """The folder of lm-eval's task files."""
    (root,) = find_spec("lm_eval").submodule_search_locations  # type: ignore[union-attr, misc]
    return Path(root) / "tasks"


@cache
def task_manager(folders: tuple[str, ...]) -> Any:
    """lm-eval's index of the tasks in `folders`, its own or, absolute, a user's; that of all its own, ".", is slow.

    Where two have a task of one name the later one counts.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[tasks_root() / each for each in folders], include_defaults=False)


def leaves(benchmark: Benchmark) -> set[str]:
    """Names of the tasks behind a benchmark: its own, or those of the group or tag of lm-eval that it only names."""
    if benchmark.tasks or not benchmark.folders:
        return set(benchmark.tasks)
    index = task_manager(benchmark.folders).task_index
    found, left, seen = set(), [benchmark.name], set()
    while left:
        name = left.pop()
        if name in seen:  # lm-eval has groups that hold themselves
            continue
        seen.add(name)
        entry = index.get(name)
        if entry is None or entry.kind.name in ("TASK", "PY_TASK"):
            found.add(name)
            continue
        below = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
        left += [each if isinstance(each, str) else each.get("task", "") for each in below or []]
        left += [each for each, other in index.items() if name in other.tags]
    return found
