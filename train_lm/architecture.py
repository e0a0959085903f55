"""The Transformers config of the model to train, from the fields of `ModelConfig`, and back."""

from dataclasses import asdict, replace
from typing import Any

from hf_ibnorm.swap.families import FAMILIES

from .settings import SIZES, TrainConfig

_SYNONYMS = {
    "intermediate_size": ("intermediate_size", "n_inner"),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "dropout": ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
}
"""Field of `ModelConfig` → its names in Transformers' configs, whose `attribute_map` knows all other names."""


def names_in(built: Any, field: str) -> list[str]:
    """The attributes of a model's Transformers config that a field of `ModelConfig` sets: none, one or several."""
    return [name for name in _SYNONYMS.get(field, (field,)) if hasattr(built, name)]


def build_model_config(config: TrainConfig, vocab_size: int | None = None, eos_token_id: int = 0) -> Any:
    """The Transformers config of the model to train, where it does not start from a checkpoint.

    `vocab_size` and `eos_token_id`, of the token between documents, are the tokenizer's; None while there is none, for
    `model.vocab_size` or `tokenizer_vocab_size`. ValueError or TypeError for a bad norm or size.
    """
    model = config.model
    rows = model.vocab_size or vocab_size or config.tokenizer_vocab_size
    check_vocabulary(rows, vocab_size)
    family: Any = next(family for family in FAMILIES if family.stock_model_type == model.model_type).config
    stock = family()
    if model.num_key_value_heads not in (None, model.num_attention_heads) and not hasattr(stock, "num_key_value_heads"):
        has = f"{model.model_type} has no grouped heads"
        raise ValueError(f"model.num_key_value_heads: got {model.num_key_value_heads}, {has}")
    width = model.hidden_size // model.num_attention_heads
    if hasattr(stock, "rope_parameters") and width % 2:
        raise ValueError(
            f"model.num_attention_heads: got {model.num_attention_heads}, which makes heads {width} wide; "
            "rotary embeddings need an even width"
        )
    context = model.max_position_embeddings or config.block_size
    given = asdict(model) | {"vocab_size": rows, "max_position_embeddings": context}
    sizes = {name: given[field] for field in SIZES if given[field] is not None for name in names_in(stock, field)}
    norms = {name: given[name] for name in ("norm_type", "norm_kwargs", "norm_overrides")}
    return family(bos_token_id=eos_token_id, eos_token_id=eos_token_id, **norms, **sizes)


def check_vocabulary(rows: int, vocab_size: int | None) -> None:
    """Raise ValueError where a tokenizer has more tokens than the embedding has rows."""
    if vocab_size is not None and rows < vocab_size:
        raise ValueError(f"model.vocab_size: got {rows}, the tokenizer has {vocab_size} tokens")


def resolved(config: TrainConfig, built: Any) -> TrainConfig:
    """`config` with the values of the `built` model config in every field that was left open or set by a checkpoint."""
    values = {field: getattr(built, names[0]) for field in SIZES if (names := names_in(built, field))}
    if values["intermediate_size"] is None:
        values["intermediate_size"] = 4 * values["hidden_size"]  # GPT-2's default
    norms = {name: getattr(built, name) for name in ("norm_type", "norm_kwargs", "norm_overrides")}
    model = replace(config.model, model_type=built.stock_model_type, **norms, **values)
    return replace(config, model=model)
