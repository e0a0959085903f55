"""Task, tokenizer and model of a run, before anything is wrapped or trained."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import sha256_tensors
from hf_ibnorm.base.room import check_model, check_room

from .architecture import build_model_config, resolved
from .checkpoint import skeleton_of
from .model import load_teacher, make_model, read_config, scheduled_lams, shared_weights_sha, starting_config
from .resume import check_settings
from .settings import TrainConfig
from .start import Start, together
from .tasks.language import LanguageTask, Teacher, open_task
from .throughput import flops_per_token, forward_flops_per_token
from .trainable import add_adapters, freeze

_TOKEN = 4 * 8  # bytes of a token of a step: input and target as 64-bit numbers, of this step and of the next
_COMPUTED = 2 * 257
"""Bytes of a token that a model computes at a time: its logits for the smallest vocabulary, in 16 bits."""
_ENTRY = 100  # bytes of an entry of a tokenizer's vocabulary, at least


@dataclass
class Setup:
    """The model of a run and the task it is trained on.

    `skeleton` is the model without values, as it was before it was wrapped, sharded or compiled, or got adapters: the
    form in which it is saved.
    """

    config: TrainConfig
    model: PreTrainedModel
    skeleton: PreTrainedModel
    task: LanguageTask
    hashes: dict[str, str | None]
    lams: dict[str, tuple[float, float]]  # site → λ at the start and at the end of its schedule

    @property
    def flops_per_token(self) -> float:
        """Floating point operations of a token, the teacher's included."""
        own, teacher = flops_per_token(self.skeleton, self.config.block_size), self.task.teacher
        return own if teacher is None else own + forward_flops_per_token(teacher.model, self.config.block_size)

    def set_lam_fraction(self, fraction: float) -> None:
        """Set every λ to where it is after this fraction of its way."""
        for site, (start, end) in self.lams.items():
            for model in (self.model, self.skeleton):
                norm: Any = model.base_model.get_submodule(site)
                norm.set_ramped((1 - fraction) * start + fraction * end)


def set_up(config: TrainConfig, accelerator: Accelerator, start: Start, say: Callable[[str], None]) -> Setup:
    """Task, tokenizer and model: the same on every process and, norms apart, for every norm.

    `say` is told, in a line, what takes long and what of the text is left out.
    """
    setup = together(accelerator, lambda: _set_up(config, accelerator, start, say))
    if len({json.dumps(each, sort_keys=True) for each in gather_object([setup.hashes])}) > 1:
        raise UserError("corpus: the processes have different text, tokenizers, initial weights or teachers")
    return setup


def _set_up(config: TrainConfig, accelerator: Accelerator, start: Start, say: Callable[[str], None]) -> Setup:
    check_sizes(config, accelerator.num_processes)
    checkpoint = start.checkpoint()
    with bad_input():  # before a text is read
        if config.model.init_from is None:
            check_model("model", build_model_config(config))
        elif checkpoint is None:
            starting_config(config, config.model.init_from, None)
        if config.teacher is not None:
            read_config("teacher", config.teacher)
    task = open_task(config, checkpoint, say)
    model, model_config = make_model(config, task.tokenizer, start)
    task.config = config = resolved(config, model_config)
    hashes = task.hashes
    with bad_input():
        freeze(model, config)
        if config.teacher is not None:
            teacher = load_teacher(config, config.teacher, task.tokenizer)
            hashes["teacher_sha"] = sha256_tensors(teacher.named_parameters())
            task.teacher = Teacher(teacher, config)
    init_sha = checkpoint.state["hashes"]["init_sha"] if checkpoint else shared_weights_sha(model)
    hashes = {"init_sha": init_sha, **hashes}
    check_settings(config, start, checkpoint, accelerator.num_processes, hashes)
    task.read_text(accelerator)
    with bad_input():
        lams = scheduled_lams(config, model, model_config)
        skeleton = skeleton_of(model)
        add_adapters(model, config)
    if task.teacher is not None:
        task.teacher.model.to(accelerator.device)
    return Setup(config, model, skeleton, task, hashes, lams)


def check_sizes(config: TrainConfig, processes: int) -> None:
    """Refuse, before any text is read, a step that this machine cannot hold."""
    block, step = config.block_size, config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        sequences = getattr(config, name)
        check_room(name, sequences, sequences * block * _COMPUTED, f"for logits of so many sequences of {block} tokens")
    accumulated, rows = config.gradient_accumulation_steps, config.tokenizer_vocab_size
    check_room("gradient_accumulation_steps", accumulated, step * block * _TOKEN, "for the tokens of a step")
    check_room("tokenizer_vocab_size", rows, _ENTRY * rows, "for tokens")
    if config.trainable == "lora":
        needed = 2 * 4 * config.lora_rank * config.model.hidden_size * config.model.num_hidden_layers
        check_room("lora_rank", config.lora_rank, needed, "for adapters")
