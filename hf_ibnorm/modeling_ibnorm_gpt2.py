"""GPT-2 with the norms of its config, for the Auto classes."""

from transformers.models.gpt2.modeling_gpt2 import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from .configuration_ibnorm import IBNormGPT2Config
from .modeling_ibnorm import NormModelMixin


class IBNormGPT2Model(NormModelMixin, GPT2Model):
    """GPT2Model whose 2·L+1 norms (3·L+1 with cross-attention) are those of its config."""

    config: IBNormGPT2Config


class IBNormGPT2LMHeadModel(NormModelMixin, GPT2LMHeadModel):
    """GPT2LMHeadModel over `IBNormGPT2Model`.

    `from_pretrained` takes the norm fields of `IBNormGPT2Config`, and needs `norm_type` for a stock GPT2 checkpoint.
    """

    config: IBNormGPT2Config


class IBNormGPT2DoubleHeadsModel(NormModelMixin, GPT2DoubleHeadsModel):
    """GPT2DoubleHeadsModel over `IBNormGPT2Model`; loads like `IBNormGPT2LMHeadModel`."""

    config: IBNormGPT2Config


class IBNormGPT2ForSequenceClassification(NormModelMixin, GPT2ForSequenceClassification):
    """GPT2ForSequenceClassification over `IBNormGPT2Model`; loads like `IBNormGPT2LMHeadModel`."""

    config: IBNormGPT2Config


class IBNormGPT2ForTokenClassification(NormModelMixin, GPT2ForTokenClassification):
    """GPT2ForTokenClassification over `IBNormGPT2Model`; loads like `IBNormGPT2LMHeadModel`."""

    config: IBNormGPT2Config


class IBNormGPT2ForQuestionAnswering(NormModelMixin, GPT2ForQuestionAnswering):
    """GPT2ForQuestionAnswering over `IBNormGPT2Model`; loads like `IBNormGPT2LMHeadModel`."""

    config: IBNormGPT2Config


__all__ = [
    "IBNormGPT2DoubleHeadsModel",
    "IBNormGPT2ForQuestionAnswering",
    "IBNormGPT2ForSequenceClassification",
    "IBNormGPT2ForTokenClassification",
    "IBNormGPT2LMHeadModel",
    "IBNormGPT2Model",
]
