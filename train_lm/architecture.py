"""The Transformers config of the model to train, from the fields of `ModelConfig`, and back."""

import inspect
import re
from dataclasses import asdict, replace
from typing import Any

from hf_ibnorm.base.errors import bad_input
from hf_ibnorm.base.layout import NORM_FIELDS
from hf_ibnorm.checks import nearest
from hf_ibnorm.swap.families import MODEL_TYPE_PREFIX, WITH_FILES, Family

from .settings import SIZES, ModelConfig, TrainConfig

_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
"""Names of the MLP's width in Transformers' configs, whose `attribute_map` knows the names of all other sizes."""
_DROPOUT = re.compile(r"(?!classifier|summary).*(dropout|pdrop)(_prob|_rate)?$")
FAULTS = (AttributeError, LookupError, ArithmeticError, RuntimeError)
"""Errors that configs and models of Transformers raise for sizes that do not fit together, besides ValueError."""
_ESSENTIAL = ("vocab_size", "hidden_size", "num_hidden_layers")
_OF_THE_RUN = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "model_type", "architectures", "auto_map")


def causal_family(model_type: str, field: str) -> Family:
    """The architecture of a causal language model, by its model type, stock or ours.

    ValueError, which `field` opens, for a model type that has no such model, or whose config has parts.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stock = str(model_type).removeprefix(MODEL_TYPE_PREFIX)
    if stock not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not name.startswith(MODEL_TYPE_PREFIX)]
        example = ", ".join(WITH_FILES)
        raise ValueError(
            f"{field}: got {model_type!r}, must be the model type of a causal language model of Transformers, such as "
            f"{example}, qwen3 or olmo2{nearest(stock, known)}"
        )
    config = CONFIG_MAPPING[stock]()
    try:
        whole = config.get_text_config() is config
    except ValueError:  # there are several
        whole = False
    if not whole:
        text = f"; did you mean {stock}_text?" if f"{stock}_text" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else ""
        parts = ", ".join(sorted(config.sub_configs))
        raise ValueError(f"{field}: got {model_type!r}, a model of several parts ({parts}){text}")
    return Family(stock)


def names_in(built: Any, field: str) -> list[str]:
    """The attributes of a config of ours that a field of `ModelConfig` sets: none, one or several."""
    if field == "dropout":
        given = {name: getattr(built, name) for name in type(built).__dataclass_fields__ if _DROPOUT.match(name)}
        return [name for name, value in given.items() if isinstance(value, int | float)]
    names = {"intermediate_size": _INNER, "norm_eps": (built.norm_eps_field,)}.get(field, (field,))
    return [name for name in names if name and hasattr(built, name)]


def build_model_config(config: TrainConfig, vocab_size: int | None = None, eos_token_id: int = 0) -> Any:
    """The Transformers config of the model to train, where it does not start from a checkpoint.

    `vocab_size` and `eos_token_id`, of the token between documents, are the tokenizer's; None while there is none, for
    `model.vocab_size` or `tokenizer_vocab_size`. ValueError or TypeError for a bad norm or size.
    """
    rows = config.model.vocab_size or vocab_size or config.tokenizer_vocab_size
    check_vocabulary(rows, vocab_size)
    family = causal_family(config.model.model_type, "model.model_type")
    named = f"model.model_type: got {config.model.model_type!r}"
    with bad_input(*FAULTS, about=f"{named}, which does not take these sizes: "):
        return _built(config, family.config, rows, eos_token_id)


def _built(config: TrainConfig, family: Any, rows: int, eos_token_id: int) -> Any:
    """A config of the class `family`, for an embedding of so many `rows`."""
    model, stock = config.model, family()
    given = asdict(model) | {
        "vocab_size": rows,
        "max_position_embeddings": model.max_position_embeddings or config.block_size,
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
    }
    sizes = {name: given[field] for field in SIZES if given[field] is not None for name in names_in(stock, field)}
    _check_fields(model, stock)
    norms = {name: given[name] for name in NORM_FIELDS}
    tokens: dict[str, Any] = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    if getattr(stock, "pad_token_id", None) is not None:
        tokens["pad_token_id"] = None  # nothing is padded, and the embedding of that token would not be trained
    if hasattr(stock, "is_decoder"):
        tokens["is_decoder"] = True  # else a BERT reads what it is to predict
    built = family(**tokens, **norms, **sizes, **model.config_kwargs)
    width = getattr(built, "head_dim", None) or built.hidden_size // model.num_attention_heads
    if hasattr(built, "rope_parameters") and width % 2:
        raise ValueError(
            f"model.num_attention_heads: got {model.num_attention_heads}, which makes heads {width} wide; "
            "rotary embeddings need an even width"
        )
    return built


def idle_sizes(model_type: str) -> list[str]:
    """The sizes in `ModelConfig` that an architecture's config has no place for; ValueError for an unknown one."""
    default = causal_family(model_type, "model.model_type").config()
    return [field for field in SIZES if not names_in(default, field)]


def _check_fields(model: ModelConfig, stock: Any) -> None:
    """Raise ValueError for a setting that the architecture's config, of which `stock` is one, has no place for."""
    name = model.model_type
    for field in _ESSENTIAL:
        if not names_in(stock, field):
            raise ValueError(f"model.model_type: got {name!r}, whose config has no {field}")
    groups = model.num_key_value_heads
    if groups not in (None, model.num_attention_heads) and not names_in(stock, "num_key_value_heads"):
        raise ValueError(f"model.num_key_value_heads: got {groups}, {name} has no grouped heads")
    set_by = {
        stock.attribute_map.get(each, each): field for field in SIZES for each in (field, *names_in(stock, field))
    }
    fields = [field for field in type(stock).__dataclass_fields__ if field not in set_by]
    for field in model.config_kwargs:
        if setting := set_by.get(stock.attribute_map.get(field, field)):
            raise ValueError(f"model.config_kwargs: got {field}, which model.{setting} sets")
        if field in (*NORM_FIELDS, *_OF_THE_RUN):
            raise ValueError(f"model.config_kwargs: got {field}, which the run sets")
        if field not in fields and not _is_read(name, field):
            raise ValueError(f"model.config_kwargs: got {field}, {name} has no such field{nearest(field, fields)}")


def _is_read(model_type: str, field: str) -> bool:
    """Whether the code of an architecture's model reads a field that its config's class does not declare."""
    code = inspect.getsource(inspect.getmodule(Family(model_type).causal_lm.stock))  # type: ignore[attr-defined, arg-type]
    name = re.escape(field)
    return re.search(rf"""config\.{name}\b|getattr\(config, ["']{name}["']""", code) is not None


def check_vocabulary(rows: int, vocab_size: int | None) -> None:
    """Raise ValueError where a tokenizer has more tokens than the embedding has rows."""
    if vocab_size is not None and rows < vocab_size:
        raise ValueError(f"model.vocab_size: got {rows}, the tokenizer has {vocab_size} tokens")


def resolved(config: TrainConfig, built: Any) -> TrainConfig:
    """`config` with the values of the `built` model config in every field that was left open or set by a checkpoint."""
    values = {field: getattr(built, names[0]) for field in SIZES if (names := names_in(built, field))}
    if values.get("intermediate_size", 0) is None:
        values["intermediate_size"] = 4 * values["hidden_size"]  # GPT-2's default
    norms = {name: getattr(built, name) for name in NORM_FIELDS}
    model = replace(config.model, model_type=built.stock_model_type, **norms, **values)
    return replace(config, model=model)
