"""The model families: which classes stand in for which stock ones. The one list that registration and patching read."""

from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from .configuration_ibnorm import IBNormGPT2Config, IBNormLlamaConfig, NormConfigMixin
from .modeling_ibnorm_gpt2 import IBNormGPT2ForSequenceClassification, IBNormGPT2LMHeadModel, IBNormGPT2Model
from .modeling_ibnorm_llama import IBNormLlamaForCausalLM, IBNormLlamaForSequenceClassification, IBNormLlamaModel


@dataclass(frozen=True)
class Family:
    """One architecture: its config, base model, language model and sequence classifier."""

    config: type[NormConfigMixin]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    classifier: type[PreTrainedModel]

    @property
    def auto_classes(self) -> dict[Any, type[PreTrainedModel]]:
        """The class for each of Transformers' Auto classes."""
        return {
            AutoModel: self.model,
            AutoModelForCausalLM: self.causal_lm,
            AutoModelForSequenceClassification: self.classifier,
        }

    @property
    def stock_classes(self) -> dict[type[PreTrainedModel], type[PreTrainedModel]]:
        """Stock class → ours; each of ours derives from (NormInitMixin, stock class)."""
        return {cls.__bases__[1]: cls for cls in self.auto_classes.values()}


FAMILIES = (
    Family(IBNormLlamaConfig, IBNormLlamaModel, IBNormLlamaForCausalLM, IBNormLlamaForSequenceClassification),
    Family(IBNormGPT2Config, IBNormGPT2Model, IBNormGPT2LMHeadModel, IBNormGPT2ForSequenceClassification),
)


def register() -> None:
    """Make the families known to the Auto classes."""
    for family in FAMILIES:
        AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
        for auto_class, cls in family.auto_classes.items():
            auto_class.register(family.config, cls, exist_ok=True)
