"""The model families: which classes stand in for which stock ones. The one list that registration and patching read.

A family names its classes and imports them when they are asked for, so that all families can be known to Transformers'
Auto classes from the start.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .base.lazy import after_import

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .configuration_ibnorm import NormConfigMixin


@dataclass(frozen=True)
class Family:
    """One architecture: the stock model type, and the names of its config, base model, language model and classifier.

    The config is in `configuration_ibnorm`, the models are in `modeling_ibnorm_` and the stock model type.
    """

    stock_model_type: str
    config_name: str
    model_name: str
    causal_lm_name: str
    classifier_name: str

    @property
    def model_type(self) -> str:
        """The `model_type` in its configs."""
        return f"ibnorm_{self.stock_model_type}"

    @property
    def config(self) -> type["NormConfigMixin"]:
        """Its config's class."""
        return getattr(import_module(".configuration_ibnorm", __package__), self.config_name)

    @property
    def model(self) -> type["PreTrainedModel"]:
        """Its base model's class."""
        return self._modeling(self.model_name)

    @property
    def causal_lm(self) -> type["PreTrainedModel"]:
        """Its language model's class."""
        return self._modeling(self.causal_lm_name)

    @property
    def classifier(self) -> type["PreTrainedModel"]:
        """Its sequence classifier's class."""
        return self._modeling(self.classifier_name)

    def _modeling(self, name: str) -> Any:
        return getattr(import_module(f".modeling_ibnorm_{self.stock_model_type}", __package__), name)

    @property
    def auto_classes(self) -> dict[Any, type["PreTrainedModel"]]:
        """The class for each of Transformers' Auto classes."""
        from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

        return {
            AutoModel: self.model,
            AutoModelForCausalLM: self.causal_lm,
            AutoModelForSequenceClassification: self.classifier,
        }

    @property
    def stock_classes(self) -> dict[type["PreTrainedModel"], type["PreTrainedModel"]]:
        """Stock class → ours; each of ours derives from (NormInitMixin, stock class)."""
        return {cls.__bases__[1]: cls for cls in self.auto_classes.values()}


FAMILIES = (
    Family(
        "llama",
        "IBNormLlamaConfig",
        "IBNormLlamaModel",
        "IBNormLlamaForCausalLM",
        "IBNormLlamaForSequenceClassification",
    ),
    Family(
        "gpt2",
        "IBNormGPT2Config",
        "IBNormGPT2Model",
        "IBNormGPT2LMHeadModel",
        "IBNormGPT2ForSequenceClassification",
    ),
)


def register() -> None:
    """Make the families known to the Auto classes, as soon as those are imported, as Transformers' own models are.

    Transformers' tables hold names of classes, and for each model type a module that is asked for a class when it is
    needed. For our types that module is this package, whose names are on demand. `AutoModel.register` wants the classes
    themselves.
    """
    tables = {"configuration_auto": _register_configs, "modeling_auto": _register_models}
    after_import("transformers.models.auto", tables)


def _register_configs(auto: ModuleType) -> None:
    table = auto.CONFIG_MAPPING
    titles = getattr(auto, "MODEL_NAMES_MAPPING", {})  # in older releases, for docstrings
    for family in FAMILIES:
        titles[family.model_type] = family.config_name
        table._mapping[family.model_type] = family.config_name
        table._modules[auto.model_type_to_module_name(family.model_type)] = sys.modules[__package__]
        # The class of a checkpoint that carries its code, loaded before this package was: it would come first.
        table._extra_content.pop(family.model_type, None)


def _register_models(auto: ModuleType) -> None:
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    for family in FAMILIES:
        names = {
            "MODEL_MAPPING": family.model_name,
            "MODEL_FOR_CAUSAL_LM_MAPPING": family.causal_lm_name,
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": family.classifier_name,
        }
        for table, name in ((getattr(auto, each), name) for each, name in names.items()):
            table._model_mapping[family.model_type] = name
            table._reverse_config_mapping[family.config_name] = family.model_type
            table._modules[model_type_to_module_name(family.model_type)] = sys.modules[__package__]
