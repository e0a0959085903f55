"""Flags that would do nothing beside the other settings, and are refused, so that nobody believes they did something.

Only flags: a recipe lists every field, used or not. One that has its default again takes back what a recipe says.
"""

import operator
from collections.abc import Collection

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.data import CORPORA

from .settings import SIZES, TrainConfig


def refuse_idle(config: TrainConfig, given: Collection[str]) -> None:
    """Raise UserError, saying why, where a flag does nothing; `given`: fields set by flags, as "model.hidden_size"."""
    defaults = TrainConfig("")
    for names, is_idle, why in _idle_fields(config):
        for name in names.split():
            value = operator.attrgetter(name)
            if is_idle and name in given and value(config) != value(defaults):
                raise UserError(f"{name}: got {value(config)!r}, which nothing would use: {why}; leave it out")


def _idle_fields(config: TrainConfig) -> tuple[tuple[str, bool, str], ...]:
    """Fields, whether they are idle, and why."""
    starts = config.model.init_from is not None
    embedded = config.corpus in CORPORA and config.validation_corpus is None
    splits = "corpus_config train_split validation_split validation_every"
    trained = "tokenizer_vocab_size tokenizer_documents"
    no_training = "a tokenizer is given, and none is trained"
    of_a_checkpoint = " ".join(f"model.{name}" for name in ("model_type", *SIZES) if name != "dropout")
    return (
        ("lora_rank lora_alpha lora_targets", config.trainable != "lora", "trainable is not lora"),
        ("distillation_weight distillation_temperature", config.teacher is None, "there is no teacher"),
        (trained, config.tokenizer is not None or starts, no_training),
        ("gradient_accumulation_steps", config.global_batch_size is not None, "global_batch_size decides it"),
        ("tracker_project", {*config.log_with} <= {"tensorboard"}, "only other trackers have projects"),
        ("shuffle_buffer", not config.streaming, "streaming is false"),
        ("validation_every", config.validation_corpus is not None, "validation_corpus is given"),
        ("validation_every", config.streaming, "nothing is held out of a stream"),
        (splits, embedded, "an embedded corpus has its own splits"),
        ("text_field", embedded, "an embedded corpus has no fields"),
        (of_a_checkpoint, starts, "model.init_from has its own"),
    )
