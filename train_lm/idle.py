"""Flags that would do nothing beside the other settings, and are refused, so that nobody believes they did something.

Only flags: a recipe lists every field, used or not. One that has its default again takes back what a recipe says.
"""

import operator
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.data import CORPORA

if TYPE_CHECKING:
    from .settings import TrainConfig

_OF_A_CHECKPOINT = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "initializer_range", "norm_eps"),
)
_NO_LORA = "trainable is not lora"
_NO_TEACHER = "there is no teacher"
_TOKENIZER = "a tokenizer is given, and none is trained"
_FROM_CHECKPOINT = "model.init_from has its own"
_EMBEDDED = "an embedded corpus has its own splits"

# Fields, when they are idle, and why.
_IDLE: tuple[tuple[tuple[str, ...], Callable[["TrainConfig"], bool], str], ...] = (
    (("lora_rank", "lora_alpha", "lora_targets"), lambda config: config.trainable != "lora", _NO_LORA),
    (("distillation_weight", "distillation_temperature"), lambda config: config.teacher is None, _NO_TEACHER),
    (("tokenizer_vocab_size", "tokenizer_documents"), lambda config: config.tokenizer is not None, _TOKENIZER),
    (("tokenizer_vocab_size", "tokenizer_documents"), lambda config: config.model.init_from is not None, _TOKENIZER),
    (
        ("gradient_accumulation_steps",),
        lambda config: config.global_batch_size is not None,
        "global_batch_size decides it",
    ),
    (("tracker_project",), lambda config: {*config.log_with} <= {"tensorboard"}, "only other trackers have projects"),
    (("shuffle_buffer",), lambda config: not config.streaming, "streaming is false"),
    (("validation_every",), lambda config: config.validation_corpus is not None, "validation_corpus is given"),
    (("validation_every",), lambda config: config.streaming, "nothing is held out of a stream"),
    (
        ("corpus_config", "train_split", "validation_split", "validation_every"),
        lambda config: config.corpus in CORPORA and config.validation_corpus is None,
        _EMBEDDED,
    ),
    (
        ("text_field",),
        lambda config: config.corpus in CORPORA and config.validation_corpus is None,
        "an embedded corpus has no fields",
    ),
    (
        tuple(f"model.{name}" for name in _OF_A_CHECKPOINT),
        lambda config: config.model.init_from is not None,
        _FROM_CHECKPOINT,
    ),
)


def refuse_idle(config: "TrainConfig", given: Collection[str]) -> None:
    """Refuse flags without effect.

    Args:
        config: the run.
        given: fields that were set by flags, such as "model.hidden_size".

    Raises:
        UserError: one of them does nothing; the message says why.
    """
    defaults = type(config)("")
    for fields, is_idle, why in _IDLE:
        for field in fields:
            value = operator.attrgetter(field)
            if field in given and is_idle(config) and value(config) != value(defaults):
                raise UserError(f"{field}: got {value(config)!r}, which nothing would use: {why}; leave it out")
