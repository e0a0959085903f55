"""File names and contents of the directories that programs share: runs, scores, conversions and studies.

Each `_FORM` is the form, for `reading.check_form`, of the part of a file that readers need, so that older files pass.
"""

_NUMBER = (float, type(None))

# The directory of a training run.
CONFIG, ENVIRONMENT, METRICS, NORMS = "config.yaml", "environment.json", "metrics.jsonl", "norms.jsonl"
CHECKPOINTS, LATEST, FINAL = "checkpoints", "latest", "final"
"""Folder of the checkpoints, the file in it that names the newest one, and the folder of the finished model."""
MODEL = "model"
"""The folder of a checkpoint that `from_pretrained` loads."""


def checkpoint_name(step: int | str) -> str:
    """The folder of the checkpoint after `step`; a glob or a regular expression in its place makes a pattern."""
    return f"step-{step}"


NORM_FIELDS = ("norm_type", "norm_kwargs", "norm_overrides")
"""Fields of a run's model that say its norms, as its Transformers config has them."""
RUN_CONFIG_FORM = {
    **{"seed": int, "corpus?": str},
    "model": {"norm_type": str, "norm_kwargs": {"lam?": _NUMBER}, "norm_overrides?": list, "model_type?": str},
}
RUN_NORM_FORM = {"type": str, "kwargs": {"lam?": _NUMBER}}  # a norm in `norm_overrides`
RUN_ENVIRONMENT_FORM = {
    **{"init_sha": str, "parameters": int, "device": str, "cpu_count": int, "date": str},
    "versions": {"torch": str, "*": (str, type(None))},
    **{"num_processes?": (int, type(None)), "flops_per_token?": _NUMBER, "on_hub?": [str], "harmless_settings?": [str]},
}
HASHES = {
    "init_sha": "initial values of the shared parameters",
    "tokenizer_sha": "tokenizer",
    "train_sha": "training text",
    "validation_sha": "validation text",
    "teacher_sha": "teacher",
}
"""Keys of hashes in `environment.json`, and what each is of."""
RUN_STEP_FORM = {
    **{"step": int, "tokens": int, "tokens_per_second": float, "loss": _NUMBER, "batch_sha": str},
    **dict.fromkeys(("eval_loss?", "grad_norm?", "gain_movement?", "lr?", "lam_fraction?"), _NUMBER),
}
"""A line of `metrics.jsonl`."""

# The directory of a model's scores.
SCORES, SCORES_FOLDER, MANIFEST, RESULTS = "scores.json", "scores", "manifest.json", "results"
"""The scores, their folder in a run directory, and beside them the request and the folder of all answers."""

SCORES_FORM = {
    "smoke": bool,
    "benchmarks": {
        "*": {
            **dict.fromkeys(("raw", "stderr", "normalized", "chance"), _NUMBER),
            "n": (int, type(None)),
            "details": {"metric": str, "at_chance?": bool, "tasks?": {"*": dict}},
        }
    },
}
MANIFEST_FORM = {
    "identity": {
        **{"suite": str, "benchmarks": [str], "overlong": str, "versions": dict},
        "model": {"weights": str, "config": str, "tokenizer": str, "dtype": str, "max_length": int},
        **{"prompting": {"limit": (int, type(None))}, "mirror?": (dict, type(None))},
    },
    **{"model": str, "notes": [str]},
}
RESULT_FORM = {
    "tasks?": {"*": {"items": [dict], "hash": str, "size": int}},
    **{"skipped?": str, "definition?": {"tasks": [str]}},
}

# The directory of a converted checkpoint.
CONVERSION, CONVERSION_REPORT = "conversion.json", "report"  # record of the conversion, folder of its report

# The directory of a study.
PLAN, SOURCE, RECIPES, RUNNING = "study.json", "study.yaml", "recipes", "running.json"
"""The plan, the study's file, the recipes of its conditions, and the names of the jobs that run now."""
CELLS, CELL_RUN, FAILURE, LOG = "cells", "run", "failure.json", "log.txt"
"""Folder of all cells; in a cell's folder: its run directory, the error of its last try, the output of its programs."""
SEARCHES, WINNER, TRIAL = "search", "winner.json", "result.json"
"""Folder of all searches; in a search's folder the best trial; in a trial's folder its result."""

PLAN_FORM = {"study": dict, "recipes": {"*": str}, "history": list, "command": [str]}
RUNNING_FORM = [str]
FAILURE_FORM = {"done": str, "problem": str}
WINNER_FORM = {"lam": _NUMBER, "learning_rate": _NUMBER, "trials": list}
TRIAL_FORM = {"state": str, "loss": _NUMBER, "lam": float, "learning_rate": float, "validated": list}
