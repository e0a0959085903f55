"""The model families: which classes stand in for which stock ones. The one list that registration and patching read.

A family names its classes and imports them when they are asked for, so that all families can be known to Transformers'
Auto classes from the start.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..base.lazy import after_import

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..configuration_ibnorm import NormConfigMixin
    from ..sites import Pin

PACKAGE = "hf_ibnorm"
MODEL_TYPE_PREFIX = "ibnorm_"


@dataclass(frozen=True)
class Family:
    """One architecture: its config is in `configuration_ibnorm`, its models are in `modeling_ibnorm_STOCK_MODEL_TYPE`.

    Args:
        stock_model_type: the stock model type.
        config_name: its config's class.
        stock_names: the stock classes that one of ours stands in for: base model, language model, other heads.
    """

    stock_model_type: str
    config_name: str
    stock_names: tuple[str, ...]

    @property
    def model_type(self) -> str:
        """The `model_type` in its configs."""
        return f"{MODEL_TYPE_PREFIX}{self.stock_model_type}"

    @property
    def names(self) -> dict[str, str]:
        """Name of a stock class → name of ours."""
        return {name: f"IBNorm{name}" for name in self.stock_names}

    @property
    def config(self) -> type["NormConfigMixin"]:
        """Its config's class."""
        return getattr(import_module(f"{PACKAGE}.configuration_ibnorm"), self.config_name)

    @property
    def pin(self) -> "Pin":
        """Where the norms of the stock model are, and which they are."""
        pins: dict[str, Pin] = import_module(f"{PACKAGE}.sites").PINS
        return pins[self.stock_model_type]

    @property
    def classes(self) -> tuple[type["PreTrainedModel"], ...]:
        """Its models' classes, the base model's first, the language model's second."""
        modeling = import_module(f"{PACKAGE}.modeling_ibnorm_{self.stock_model_type}")
        return tuple(getattr(modeling, name) for name in self.names.values())

    @property
    def causal_lm(self) -> type["PreTrainedModel"]:
        """Its language model's class."""
        return self.classes[1]

    @property
    def auto_classes(self) -> dict[str, type["PreTrainedModel"]]:
        """Name of each of Transformers' Auto classes that knows the stock model → our class."""
        from transformers.models.auto import modeling_auto

        ours = dict(zip(self.stock_names, self.classes, strict=True))
        found = {}
        for name, auto in vars(modeling_auto).items():
            table = getattr(auto, "_model_mapping", None) if name.startswith("Auto") else None
            stock = None if table is None else table._model_mapping.get(self.stock_model_type)
            if stock in ours:
                found[name] = ours[stock]
        return found

    @property
    def tokenizer_name(self) -> str | None:
        """The tokenizer's class that Transformers has for the stock model type; None for the general one."""
        from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

        return TOKENIZER_MAPPING_NAMES.get(self.stock_model_type)

    @property
    def stock_classes(self) -> dict[type["PreTrainedModel"], type["PreTrainedModel"]]:
        """Stock class → ours; each of ours derives from (NormModelMixin, stock class)."""
        return {cls.__bases__[1]: cls for cls in self.classes}


FAMILIES = (
    Family(
        "llama",
        "IBNormLlamaConfig",
        (
            "LlamaModel",
            "LlamaForCausalLM",
            "LlamaForSequenceClassification",
            "LlamaForTokenClassification",
            "LlamaForQuestionAnswering",
        ),
    ),
    Family(
        "gpt2",
        "IBNormGPT2Config",
        (
            "GPT2Model",
            "GPT2LMHeadModel",
            "GPT2DoubleHeadsModel",
            "GPT2ForSequenceClassification",
            "GPT2ForTokenClassification",
            "GPT2ForQuestionAnswering",
        ),
    ),
)


def register() -> None:
    """Make the families known wherever Transformers goes by model type or class name, as soon as it is imported.

    Its tables hold names of classes, and for each model type a module that is asked for a class when it is needed. For
    our types that module is this package, whose names are on demand. `AutoModel.register` wants the classes themselves,
    and reaches only some of what reads those names.
    """
    after_import(
        "transformers.models.auto",
        {
            "configuration_auto": _register_configs,
            "modeling_auto": _register_models,
            "tokenization_auto": _register_tokenizers,
        },
    )


def _register_configs(auto: ModuleType) -> None:
    table = auto.CONFIG_MAPPING
    titles = getattr(auto, "MODEL_NAMES_MAPPING", {})  # in older releases, for docstrings
    for family in FAMILIES:
        titles[family.model_type] = family.config_name
        table._mapping[family.model_type] = family.config_name
        table._modules[auto.model_type_to_module_name(family.model_type)] = sys.modules[PACKAGE]
        # The class of a checkpoint that carries its code, loaded before this package was: it would come first.
        table._extra_content.pop(family.model_type, None)


def _register_models(auto: ModuleType) -> None:
    for table in vars(auto).values():
        if isinstance(table, auto._LazyAutoMapping):
            for family in FAMILIES:
                _enter(table, family, family.names.get(table._model_mapping.get(family.stock_model_type)))


def _register_tokenizers(auto: ModuleType) -> None:
    for family in FAMILIES:
        _enter(auto.TOKENIZER_MAPPING, family, family.tokenizer_name)


def _enter(table: Any, family: Family, name: str | None) -> None:
    """Let one of Transformers' tables hold the class `name` for a family; with None, the stock model has none there."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    if name is not None:
        table._model_mapping[family.model_type] = name
        table._reverse_config_mapping[family.config_name] = family.model_type
        table._modules[model_type_to_module_name(family.model_type)] = sys.modules[PACKAGE]
