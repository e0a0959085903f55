"""The training loop, to be read from top to bottom: prepare, then step after step, then the final model."""

import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_ibnorm.cli import UserError, bad_input
from hf_ibnorm.data import load_corpus
from hf_ibnorm.files import (
    atomic_directory,
    check_new_directory,
    environment_record,
    sha256,
    sha256_tensors,
    write_json,
    write_text,
)
from hf_ibnorm.modeling_ibnorm import is_norm
from hf_ibnorm.optim import no_decay_parameter_names

from .config import TrainConfig, build_model_config, resolved
from .data import IGNORE, BlockOrder, PackedTokens, split_batch, train_tokenizer, wrap_tokenizer
from .progress import Progress


def train(config: TrainConfig) -> Path:
    """Pretrain a model and return the directory of the finished one.

    The run directory then holds `config.yaml` (a recipe that repeats the run), `environment.json`, `metrics.jsonl`
    (one object a step), `checkpoints/step-0/model/` (the initial weights) and `final/`, both of which
    `from_pretrained` loads, tokenizer included.

    Args:
        config: the run, as `TrainConfig` documents it.

    Returns:
        `run_dir/final`.

    Raises:
        UserError: bad input, before anything is written; or training diverged, with what was learnt kept on disk.
    """
    with bad_input():
        config.validate()
        build_model_config(config)  # its errors come before any work on the data
    check_precision(config.mixed_precision)
    # Without cpu=True two processes without a GPU would not find each other and train two models into one directory.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.mixed_precision)
    run_dir = Path(config.run_dir)
    check_run_dir(run_dir, accelerator)

    run = prepare(config, accelerator)
    if accelerator.is_main_process:
        with bad_input(OSError, about="run_dir: "):
            write_run_files(run_dir, resolved(config, run.model.config), run, accelerator)
    accelerator.wait_for_everyone()

    model = accelerator.prepare(run.model)
    optimizer = accelerator.prepare(build_optimizer(run.model, config))
    processes, micro_batches = accelerator.num_processes, config.gradient_accumulation_steps
    global_batch = config.per_device_train_batch_size * micro_batches * processes
    order = BlockOrder(run.train.blocks, config.seed)
    tokens = 0
    set_seed(config.seed, device_specific=True)  # from here on only norms and dropout draw: differently on each rank

    with Progress(config.max_steps, enabled=accelerator.is_main_process) as progress:
        progress.say(
            f"{run.model.config.norm_type}{' (with overrides)' if run.model.config.norm_overrides else ''}: "
            f"{run.model.num_parameters():,} parameters, {run.train.targets:,} training tokens, "
            f"{config.max_steps:,} steps of {global_batch * config.block_size:,}; "
            f"initial shared weights {run.hashes['init_sha'][:16]}"
        )
        for step in range(1, config.max_steps + 1):
            started = time.perf_counter()
            model.train()
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            indices = order.take((step - 1) * global_batch, global_batch)
            inputs, targets = run.train.batch(indices)
            batch_tokens = int((targets != IGNORE).sum())
            batch_sha = sha256([inputs.numpy().tobytes(), targets.numpy().tobytes()])[:16]

            loss_sum = torch.zeros((), device=accelerator.device)
            for i, part in enumerate(split_batch(indices, micro_batches, processes, accelerator.process_index), 1):
                inputs, targets = (tensor.to(accelerator.device) for tensor in run.train.batch(part))
                # Gradients are averaged over processes, hence the factor: every token of the global batch weighs alike.
                with accelerator.no_sync(model) if i < micro_batches else nullcontext():
                    part_sum = token_loss(model, inputs, targets)
                    accelerator.backward(part_sum * (processes / batch_tokens))
                loss_sum += part_sum.detach()
            norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()

            loss = accelerator.reduce(loss_sum, "sum").item() / batch_tokens
            tokens += batch_tokens
            row: dict[str, Any] = {
                "step": step,
                "loss": loss,
                "lr": lr,
                "tokens": tokens,
                "tokens_per_second": batch_tokens / (time.perf_counter() - started),
                "grad_norm": float(norm),
                "batch_sha": batch_sha,
            }
            check_finite("loss", loss, step, config)
            if config.mixed_precision != "fp16":  # whose scaler skips the step and halves its scale
                check_finite("grad_norm", row["grad_norm"], step, config)
            if step % config.eval_every == 0 or step == config.max_steps:
                # Unwrapped: DDP would expect every process to run equally many batches.
                bare = accelerator.unwrap_model(model)
                row["eval_loss"] = evaluate(bare, run.validation, config, accelerator)
                check_finite("eval_loss", row["eval_loss"], step, config)
            if accelerator.is_main_process:
                append_metrics(run_dir, row)
                progress.update(row)

    final = run_dir / "final"
    if accelerator.is_main_process:
        save_model(final, accelerator.unwrap_model(model), run.tokenizer)
        progress.say(f"finished: {final}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return final


def check_precision(wanted: str) -> None:
    """Refuse a precision that would not be had, or that the launcher was told differently.

    Raises:
        UserError: fp16 without a GPU, or a launcher's own setting that differs.
    """
    if wanted == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision: got 'fp16', which needs a GPU; allowed here are no, bf16")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", wanted):
        raise UserError(f"mixed_precision: got {wanted!r}, but the launcher was given {launched!r}; set both alike")


def check_run_dir(run_dir: Path, accelerator: Accelerator) -> None:
    """Refuse a run directory that is not new; every process learns what the first one found.

    Raises:
        UserError: `run_dir` is not empty, no directory, or cannot be written.
    """
    problem = [""]
    if accelerator.is_main_process:
        try:
            check_new_directory("run_dir", run_dir)
        except OSError as error:
            problem = [str(error)]
    if found := broadcast_object_list(problem)[0]:
        raise UserError(found)


def check_finite(name: str, value: float, step: int, config: TrainConfig) -> None:
    """Stop a run whose numbers are lost; what it has written so far stays.

    Raises:
        UserError: `value` is NaN or infinite.
    """
    if not math.isfinite(value):
        raise UserError(
            f"{name}: got {value} at step {step}, training diverged: a learning_rate of {config.learning_rate:g} "
            "is too high"
        )


@dataclass
class Run:
    """What a run trains and on what."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    train: PackedTokens
    validation: PackedTokens
    hashes: dict[str, str]


def prepare(config: TrainConfig, accelerator: Accelerator) -> Run:
    """Tokenizer, packed splits and initial model: the same on every process and, norms apart, for every norm."""
    documents = {split: load_corpus(config.corpus, split) for split in ("train", "validation")}
    # Trained once and handed on: the ranks must not depend on every one of them getting the same.
    trained = [train_tokenizer(documents["train"], config.tokenizer_vocab_size) if accelerator.is_main_process else ""]
    tokenizer = wrap_tokenizer(
        broadcast_object_list(trained)[0], config.model.max_position_embeddings or config.block_size
    )
    with bad_input():
        model_config = build_model_config(config, len(tokenizer), tokenizer.eos_token_id)
    set_seed(config.seed)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    hashes = {
        "init_sha": shared_weights_sha(model),
        "tokenizer_sha": sha256([tokenizer.backend_tokenizer.to_str()]),
        **{f"{split}_sha": sha256(texts) for split, texts in documents.items()},
    }
    packed = {split: PackedTokens(tokenizer, texts, config.block_size) for split, texts in documents.items()}
    return Run(model, tokenizer, packed["train"], packed["validation"], hashes)


def shared_weights_sha(model: nn.Module) -> str:
    """Hash of every parameter that does not belong to a norm: equal for two models that differ in their norms only."""
    norms = tuple(f"{name}." for name, module in model.named_modules() if is_norm(module))
    return sha256_tensors((name, value) for name, value in model.named_parameters() if not name.startswith(norms))


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    kept = set(no_decay_parameter_names(model))
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in parameters.items() if name not in kept], "weight_decay": config.weight_decay},
        {"params": [p for name, p in parameters.items() if name in kept], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of `step` (from 1): linear warmup to the peak, then a cosine to `min_lr_rate` of it at the end."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    floor = config.min_lr_rate
    return config.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods, in nats, of the targets that count."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, data: PackedTokens, config: TrainConfig, accelerator: Accelerator) -> float:
    """Mean loss in nats over every token of a whole split, in eval mode: dropout and noise norms are quiet."""
    model.eval()
    size = config.per_device_eval_batch_size
    total = torch.zeros((), dtype=torch.float64)
    mine = range(accelerator.process_index, data.blocks, accelerator.num_processes)
    for start in range(0, len(mine), size):
        batch = data.batch(mine[start : start + size])
        inputs, targets = (tensor.to(accelerator.device) for tensor in batch)
        total += token_loss(model, inputs, targets).double().cpu()
    summed = accelerator.reduce(total.to(accelerator.device), "sum")
    return summed.item() / data.targets


def write_run_files(run_dir: Path, config: TrainConfig, run: Run, accelerator: Accelerator) -> None:
    """Everything about the run that is known before its first step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "config.yaml", yaml.safe_dump(config.as_recipe(), sort_keys=False))
    record = environment_record()
    record |= {
        **run.hashes,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "train_tokens": run.train.targets,
        "train_blocks": run.train.blocks,
        "train_padding": run.train.padding,
        "validation_tokens": run.validation.targets,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    write_json(run_dir / "environment.json", record)
    step_0 = run_dir / "checkpoints" / "step-0"
    step_0.mkdir(parents=True)
    save_model(step_0 / "model", run.model, run.tokenizer)


def save_model(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Save model and tokenizer as one directory that `from_pretrained` loads, whole or not at all."""
    with atomic_directory(path) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def append_metrics(run_dir: Path, row: dict[str, Any]) -> None:
    """Add one line to `metrics.jsonl`; a gradient norm that overflowed (fp16) becomes null, JSON has no infinity."""
    if not math.isfinite(row["grad_norm"]):
        row = {**row, "grad_norm": None}
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
