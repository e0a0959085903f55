"""The model card of a finished training run: front matter that the Hub reads, and what a reader should know."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_ibnorm.data import CORPORA
from hf_ibnorm.report.document import Document
from hf_ibnorm.report.runs import Run
from hf_ibnorm.report.tables import Table, number_cell, score_cell

FAMILY_NAMES = {"llama": "Llama", "gpt2": "GPT-2"}
USAGE = """```python
import hf_ibnorm  # registers the model with the Auto classes
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
```"""
COMPUTE_OPTIMAL = 20
"""Tokens per parameter, about, that spend a given amount of computation best (Hoffmann et al., 2022)."""


def model_card(run: Run, repo: str | None = None, remote_code: bool = False) -> str:
    """The card, as the text of a `README.md` that stands beside the model and `loss.png`.

    It names no path of the machine: only the last part of one that a corpus, tokenizer or checkpoint came from.

    Args:
        run: a finished run, with its scores where there are any.
        repo: repository on the Hub, NAMESPACE/NAME, that the model is loaded from; None for a directory.
        remote_code: whether the code of the model lies beside it.

    Returns:
        Markdown with YAML front matter; the same run gives the same text.
    """
    name = repo.split("/")[-1] if repo else run.name
    model = run.config["model"]
    results = _results(run.scores) if run.scores and not run.scores["smoke"] else []
    on_hub = _on_hub(run)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_ibnorm", model["norm_type"], *(norm["type"] for _, norm in model.get("norm_overrides") or [])],
        base_model=model["init_from"] if model.get("init_from") in on_hub else None,
        datasets=[run.config["corpus"]] if run.config["corpus"] in on_hub else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    start = f"started from {_shown(model['init_from'], run)}" if model.get("init_from") else "pretrained from scratch"
    card = Document(_plain(name))
    card.paragraph(
        f"A {_family(model)} language model of {run.environment['parameters']:,} parameters whose norm "
        f"is {_code(model['norm_type'])}{' (not everywhere)' if model.get('norm_overrides') else ''}, {start} with "
        "`hf_ibnorm`. This card was made from the files of its training run."
    )
    card.heading("Use")
    card.paragraph(USAGE.format(where=repo or "path/to/this/directory"))
    if remote_code:
        card.paragraph("Without the package: no import, and `trust_remote_code=True` in both calls.")
    for title, rows in (("Model", _architecture(run)), ("Training", _training(run))):
        card.heading(title)
        card.bullets(f"{name}: {text}" for name, text in rows.items())
    card.picture(Path("loss.png"), "training and validation loss against the step")
    card.heading("Scores")
    _add_scores(card, run.scores)
    card.heading("Limits")
    card.paragraph(_limits(run))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card.markdown()}"))


def _results(scores: dict[str, Any]) -> list[EvalResult]:
    """Scores as the front matter's `model-index` has them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=row["details"]["metric"],
            metric_value=row["raw"],
        )
        for name, row in scores["benchmarks"].items()
        if row["raw"] is not None
    ]


def _architecture(run: Run) -> dict[str, str]:
    model = run.config["model"]
    heads, shared = model["num_attention_heads"], model.get("num_key_value_heads") or model["num_attention_heads"]
    few = "" if shared == heads else f" that share {shared} of keys and values"
    tied = "one embedding for input and output" if model["tie_word_embeddings"] else "output layer of its own"
    rows = {
        "family": f"{_family(model)}, {model['num_hidden_layers']} layers, hidden size "
        f"{model['hidden_size']}, MLP {model['intermediate_size']}, {heads} attention heads{few}, {tied}",
        "parameters": f"{run.environment['parameters']:,}",
        "vocabulary and context": f"{model['vocab_size']:,} tokens, {model['max_position_embeddings']:,} positions",
        "norm": _norm(model["norm_type"], model["norm_kwargs"]),
    }
    for glob, norm in model.get("norm_overrides") or []:
        rows[f"norm at {_code(glob)}"] = _norm(norm["type"], norm["kwargs"])
    if model.get("init_from"):
        rows["started from"] = _shown(model["init_from"], run)
    return rows


def _training(run: Run) -> dict[str, str]:
    config, environment, last = run.config, run.environment, run.metrics[-1]
    processes = environment.get("num_processes", 1)
    sequences = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * processes
    known = environment.get("train_tokens")
    passes = f", {last['tokens'] / known:.2g} passes over the text" if known else ""
    embedded = config["corpus"] in CORPORA
    subset = f", configuration {_code(config['corpus_config'])}" if config.get("corpus_config") else ""
    if config.get("validation_corpus"):
        validation = _shown(config["validation_corpus"], run)
    elif embedded:
        validation = "the corpus's validation split"
    else:
        held = f"one document in {config['validation_every']}, held out"
        validation = f"split {_code(config['validation_split'])} (a corpus without one: {held})"
    blocks = f", its first {config['max_eval_blocks']} blocks" if config.get("max_eval_blocks") else ""
    hashes = {"training text": "train_sha", "validation text": "validation_sha", "tokenizer": "tokenizer_sha"}
    known_hashes = [f"{what} {_code(sha)}" for what, key in hashes.items() if (sha := environment.get(key))]
    precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[config["mixed_precision"]]
    skipped = sum("skipped" in row for row in run.metrics)
    rows = {
        "text": _shown(config["corpus"], run)
        + subset
        + (" (embedded in hf_ibnorm)" if embedded else f", split {_code(config['train_split'])}")
        + (", streamed" if config["streaming"] else ""),
        "tokenizer": _shown(config["tokenizer"], run) if config.get("tokenizer") else _own_tokenizer(config),
        "SHA-256": ", ".join(known_hashes) or "none: what is streamed is not hashed",
        "tokens": f"{last['tokens']:,}{passes}",
        "steps": f"{last['step']:,} of {sequences:,} sequences of {config['block_size']:,} tokens"
        + (f"; {skipped} were skipped, their loss or gradient was not finite" if skipped else ""),
        "optimizer": f"AdamW, β {config['adam_beta1']:g} and {config['adam_beta2']:g}, weight decay "
        f"{config['weight_decay']:g} on matrices only, gradients "
        + (f"clipped to norm {config['max_grad_norm']:g}" if config["max_grad_norm"] else "not clipped"),
        "learning rate": f"linear warmup of {config['warmup_steps']:,} steps to {config['learning_rate']:g}, then a "
        f"cosine to {config['min_lr_rate']:g} of that",
        "precision": f"float32 weights, {precision} arithmetic",
        "seed": str(config["seed"]),
        "hardware": f"{_plain(environment['device'])}, {environment['cpu_count']} CPU cores, {processes} "
        f"{'process' if processes == 1 else 'processes'}, {_duration(run.seconds())} in training steps",
        "versions": ", ".join(
            f"{name} {version}"
            for name in ("hf_ibnorm", "torch", "transformers", "accelerate", "python")
            if (version := environment["versions"].get(name))
        ),
        "begun": str(environment["date"])[:10],
        "final validation loss": f"**{last['eval_loss']:.4f}** nats per token on {validation}{blocks}",
    }
    if config["lam_schedule"] == "linear":
        rows["λ"] = f"ramped linearly from where it compresses nothing, in {config['lam_warmup_steps']:,} steps"
    if (trainable := config.get("trainable", "all")) != "all":
        adapters = f", and LoRA adapters of rank {config['lora_rank']}, merged into the weights"
        rows["trained"] = f"the norms{adapters if trainable == 'lora' else ' alone'}"
    if config.get("teacher"):
        weight, temperature = config["distillation_weight"], config["distillation_temperature"]
        rows["teacher"] = (
            f"{_shown(config['teacher'], run)}: the training loss is {1 - weight:g} times the cross-entropy and "
            f"{weight:g} times the divergence from its probabilities, at temperature {temperature:g}"
        )
    return rows


def _own_tokenizer(config: dict[str, Any]) -> str:
    if config["model"].get("init_from"):
        return "that of the checkpoint it started from"
    return "byte-level BPE trained on the training text"


def _add_scores(card: Document, scores: dict[str, Any] | None) -> None:
    """The section on scores."""
    if scores is None:
        card.paragraph("Not scored.")
        return
    table = Table(["benchmark", "metric", "score", "normalized", "items"])
    for name, row in scores["benchmarks"].items():
        metric = row["details"]["metric"]
        lower = " (lower is better)" if metric == "bits_per_byte" else ""
        level, items = number_cell(row["normalized"], ".2f"), number_cell(row["n"], ",")
        table.rows.append([_code(name), _code(metric) + lower, score_cell(row), level, items])
    if scores["smoke"]:
        card.paragraph("**SMOKE - not leaderboard scores**: part of the items only, or changed generation settings.")
    card.paragraph(
        "Measured by `python -m eval run`, through lm-evaluation-harness: score ± standard error; normalized puts "
        "guessing at 0 and a perfect score at 100."
    )
    card.table(table)
    if scores.get("average") is not None:
        card.paragraph(f"Average of the suite {_code(scores['suite'])}: **{scores['average']:.2f}** of 100.")
    notes = (note for note in scores.get("notes", []) if not note.startswith("SMOKE"))
    card.bullets(_plain(_without_paths(note)) for note in notes)


def _limits(run: Run) -> str:
    config, tokens = run.config, run.metrics[-1]["tokens"]
    ratio = tokens / run.environment["parameters"]
    lines = [
        "This is a base model: it continues text in the manner of what it was trained on, with its errors and biases, "
        "and was not tuned to follow instructions or to be safe."
    ]
    if not config["model"].get("init_from") and ratio < COMPUTE_OPTIMAL:
        lines.append(
            f"It saw {ratio:.2g} tokens per parameter, where about {COMPUTE_OPTIMAL} make the best use of computation "
            "(Hoffmann et al., 2022): it is undertrained."
        )
    lines += [
        f"Its numbers are those of one run with one seed ({config['seed']}) and say nothing on whether its norm is "
        "better than another: that takes several seeds and a tuned learning rate for each norm.",
        "A loss per token depends on the tokenizer and can be compared between models that share it only.",
        "This card states no licence and no intended use; whoever publishes the model does, and answers for the rights "
        "to its training text.",
    ]
    return " ".join(lines)


def _family(model: dict[str, Any]) -> str:
    return FAMILY_NAMES.get(model["model_type"], model["model_type"])


def _norm(name: str, options: dict[str, Any]) -> str:
    shown = ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in options.items()
        if key != "backend" and value is not None
    )
    return _code(name) + (f" with {_code(shown)}" if shown else "")


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} seconds"


def _shown(name: str, run: Run) -> str:
    """A corpus, tokenizer or checkpoint by its name on the Hub, or by the last part of its path."""
    return _code(name if name in _on_hub(run) else re.split(r"[/\\]", name.rstrip("/\\"))[-1])


def _on_hub(run: Run) -> list[str]:
    """What the run loaded from the Hub: only where it ran could a name be told from a directory."""
    names: list[str] = run.environment.get("on_hub", [])
    return names


def _without_paths(text: str) -> str:
    """`text` with the last part of every absolute path in place of the path."""
    return re.sub(r"(?<![\w:/.])~?/(?:[^\s/'\"]+/)+([^\s/'\"]*)", r"\1", text)


def _code(value: object) -> str:
    """Any text as inline code on one line, backticks in it or not."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"


def _plain(value: object) -> str:
    """Any text on one line, with nothing in it that Markdown would take for markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", " ".join(str(value).split()))
