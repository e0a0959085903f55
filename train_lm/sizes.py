"""Sizes of a run that this machine cannot hold, refused before any text is read."""

from hf_ibnorm.base.room import check_room

from .settings import TrainConfig

_TOKEN = 4 * 8
"""Bytes of a token of a step: input and target as 64-bit numbers, of this step and of the next."""
_COMPUTED = 2 * 257
"""Bytes of a token that a model computes at a time: its logits for the smallest vocabulary, in 16 bits."""

_ENTRY = 100
"""Bytes of an entry of a tokenizer's vocabulary, at least."""


def check_sizes(config: TrainConfig, processes: int) -> None:
    """Refuse a step that cannot be held.

    Args:
        config: a validated run, as `spread_over` leaves it.
        processes: how many share a step.

    Raises:
        UserError: naming the field, the value and what it would take.
    """
    block = config.block_size
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        sequences = getattr(config, name)
        check_room(name, sequences, sequences * block * _COMPUTED, f"for logits of so many sequences of {block} tokens")
    accumulated = config.gradient_accumulation_steps
    step = config.per_device_train_batch_size * accumulated * processes
    check_room("gradient_accumulation_steps", accumulated, step * block * _TOKEN, "for the tokens of a step")
    check_room("tokenizer_vocab_size", config.tokenizer_vocab_size, _ENTRY * config.tokenizer_vocab_size, "for tokens")
    if config.trainable == "lora":
        model = config.model
        needed = 2 * 4 * config.lora_rank * model.hidden_size * model.num_hidden_layers
        check_room("lora_rank", config.lora_rank, needed, "for adapters")
