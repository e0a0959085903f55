"""Llama with the norms of its config, for the Auto classes."""

from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from .configuration_ibnorm import IBNormLlamaConfig
from .modeling_ibnorm import NormModelMixin


class IBNormLlamaModel(NormModelMixin, LlamaModel):
    """LlamaModel whose 2·L+1 norms are those of its config (`norm_type`, `norm_kwargs`, `norm_overrides`)."""

    config: IBNormLlamaConfig


class IBNormLlamaForCausalLM(NormModelMixin, LlamaForCausalLM):
    """LlamaForCausalLM over `IBNormLlamaModel`.

    `from_pretrained` takes the norm fields of `IBNormLlamaConfig`, and needs `norm_type` for a stock Llama checkpoint.
    """

    config: IBNormLlamaConfig


class IBNormLlamaForSequenceClassification(NormModelMixin, LlamaForSequenceClassification):
    """LlamaForSequenceClassification over `IBNormLlamaModel`; loads like `IBNormLlamaForCausalLM`."""

    config: IBNormLlamaConfig


class IBNormLlamaForTokenClassification(NormModelMixin, LlamaForTokenClassification):
    """LlamaForTokenClassification over `IBNormLlamaModel`; loads like `IBNormLlamaForCausalLM`."""

    config: IBNormLlamaConfig


class IBNormLlamaForQuestionAnswering(NormModelMixin, LlamaForQuestionAnswering):
    """LlamaForQuestionAnswering over `IBNormLlamaModel`, which it calls `transformer`, as the stock one does."""

    config: IBNormLlamaConfig


__all__ = [
    "IBNormLlamaForCausalLM",
    "IBNormLlamaForQuestionAnswering",
    "IBNormLlamaForSequenceClassification",
    "IBNormLlamaForTokenClassification",
    "IBNormLlamaModel",
]
