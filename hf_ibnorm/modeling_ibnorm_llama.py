"""Llama with the norms of its config, for the Auto classes."""

from torch import nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

# Not used here: Transformers before 5.10 copies only those files of a checkpoint's code that this one imports itself.
from .checks import check_number as check_number
from .configuration_ibnorm import IBNormLlamaConfig
from .functional import ib_norm as ib_norm
from .modeling_ibnorm import NormInitMixin, install_norms, token_dropout
from .norms import NormBase as NormBase


class IBNormLlamaModel(NormInitMixin, LlamaModel):
    """LlamaModel whose 2·L+1 norms are those of its config (`norm_type`, `norm_kwargs`, `norm_overrides`)."""

    config: IBNormLlamaConfig
    config_class = IBNormLlamaConfig

    def __init__(self, config: IBNormLlamaConfig) -> None:
        super().__init__(config)
        install_norms(self, config)
        self.post_init()  # touches the new norms only


class IBNormLlamaForCausalLM(NormInitMixin, LlamaForCausalLM):
    """LlamaForCausalLM over `IBNormLlamaModel`.

    `from_pretrained` takes the norm fields of `IBNormLlamaConfig`, and needs `norm_type` for a stock Llama checkpoint.
    """

    config: IBNormLlamaConfig
    config_class = IBNormLlamaConfig

    def __init__(self, config: IBNormLlamaConfig) -> None:
        # Past LlamaForCausalLM, which would build (and draw random numbers for) a stock model first.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = IBNormLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class IBNormLlamaForSequenceClassification(NormInitMixin, LlamaForSequenceClassification):
    """LlamaForSequenceClassification over `IBNormLlamaModel`; loads like `IBNormLlamaForCausalLM`."""

    config: IBNormLlamaConfig
    config_class = IBNormLlamaConfig

    def __init__(self, config: IBNormLlamaConfig) -> None:
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = IBNormLlamaModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class IBNormLlamaForTokenClassification(NormInitMixin, LlamaForTokenClassification):
    """LlamaForTokenClassification over `IBNormLlamaModel`; loads like `IBNormLlamaForCausalLM`."""

    config: IBNormLlamaConfig
    config_class = IBNormLlamaConfig

    def __init__(self, config: IBNormLlamaConfig) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = IBNormLlamaModel(config)
        self.dropout = nn.Dropout(token_dropout(config))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=bias)
        self.post_init()


class IBNormLlamaForQuestionAnswering(NormInitMixin, LlamaForQuestionAnswering):
    """LlamaForQuestionAnswering over `IBNormLlamaModel`, which it calls `transformer`, as the stock one does."""

    config: IBNormLlamaConfig
    config_class = IBNormLlamaConfig

    def __init__(self, config: IBNormLlamaConfig) -> None:
        super(GenericForQuestionAnswering, self).__init__(config)
        self.transformer = IBNormLlamaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "IBNormLlamaForCausalLM",
    "IBNormLlamaForQuestionAnswering",
    "IBNormLlamaForSequenceClassification",
    "IBNormLlamaForTokenClassification",
    "IBNormLlamaModel",
]
