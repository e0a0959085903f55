"""What a suite is made of: each benchmark's name, kind, chance level and rows, and its task for lm-eval."""

import json
from dataclasses import dataclass
from importlib import resources
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

    `kind` is "multiple_choice" (accuracy, higher is better) or "rolling" (bits per byte of whole documents, lower is
    better).
    """

    name: str
    kind: str

    def rows(self) -> list[dict[str, Any]]:
        """The items: {"query", "choices", "gold", "cluster"}, or {"text"} for rolling ones."""
        if self.kind == "rolling":
            return [{"text": text} for text in load_corpus(ROLLING[self.name], "test")]
        text = resources.files("eval.tasks").joinpath(f"{self.name}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def harness_task(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The task of `rows` as lm-eval takes it, handed over in memory so that no dataset cache is involved."""

        def dataset(**_: Any) -> dict[str, Any]:
            from datasets import Dataset

            return {"test": Dataset.from_list(rows)}

        task: dict[str, Any] = {
            "task": self.name,
            "custom_dataset": dataset,
            "test_split": "test",
            "metadata": {"version": 1.0},
        }
        if self.kind == "rolling":
            metric = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
            options = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        else:
            metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
            options = {
                "output_type": "multiple_choice",
                "doc_to_text": "{{query}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "gold",
                "target_delimiter": " ",
            }
        return task | options | {"metric_list": [metric]}


SUITES = {
    "embedded": [Benchmark(name, "rolling") for name in ROLLING]
    + [Benchmark(name, "multiple_choice") for name in MULTIPLE_CHOICE]
}
