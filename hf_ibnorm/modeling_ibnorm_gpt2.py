"""GPT-2 with the norms of its config, for the Auto classes."""

from torch import nn
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2SequenceSummary,
)

# Not used here: Transformers before 5.10 copies only those files of a checkpoint's code that this one imports itself.
from .checks import check_number as check_number
from .configuration_ibnorm import IBNormGPT2Config
from .functional import ib_norm as ib_norm
from .modeling_ibnorm import NormInitMixin, install_norms, token_dropout
from .norms import NormBase as NormBase


class IBNormGPT2Model(NormInitMixin, GPT2Model):
    """GPT2Model whose 2·L+1 norms (3·L+1 with cross-attention) are those of its config."""

    config: IBNormGPT2Config
    config_class = IBNormGPT2Config

    def __init__(self, config: IBNormGPT2Config) -> None:
        super().__init__(config)
        install_norms(self, config)
        self.post_init()  # touches the new norms only


class IBNormGPT2LMHeadModel(NormInitMixin, GPT2LMHeadModel):
    """GPT2LMHeadModel over `IBNormGPT2Model`.

    `from_pretrained` takes the norm fields of `IBNormGPT2Config`, and needs `norm_type` for a stock GPT2 checkpoint.
    """

    config: IBNormGPT2Config
    config_class = IBNormGPT2Config

    def __init__(self, config: IBNormGPT2Config) -> None:
        # Past GPT2LMHeadModel, which would build (and draw random numbers for) a stock model first.
        super(GPT2LMHeadModel, self).__init__(config)
        self.transformer = IBNormGPT2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Transformers picks a loss by class name and would warn, breaking torch.compile(fullgraph=True).
        self.loss_type = "ForCausalLM"
        self.post_init()


class IBNormGPT2DoubleHeadsModel(NormInitMixin, GPT2DoubleHeadsModel):
    """GPT2DoubleHeadsModel over `IBNormGPT2Model`; loads like `IBNormGPT2LMHeadModel`."""

    config: IBNormGPT2Config
    config_class = IBNormGPT2Config

    def __init__(self, config: IBNormGPT2Config) -> None:
        super(GPT2DoubleHeadsModel, self).__init__(config)
        config.num_labels = 1
        self.transformer = IBNormGPT2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.multiple_choice_head = GPT2SequenceSummary(config)
        self.post_init()


class IBNormGPT2ForSequenceClassification(NormInitMixin, GPT2ForSequenceClassification):
    """GPT2ForSequenceClassification over `IBNormGPT2Model`; loads like `IBNormGPT2LMHeadModel`."""

    config: IBNormGPT2Config
    config_class = IBNormGPT2Config

    def __init__(self, config: IBNormGPT2Config) -> None:
        super(GPT2ForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.transformer = IBNormGPT2Model(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)  # type: ignore[arg-type]
        self.post_init()


class IBNormGPT2ForTokenClassification(NormInitMixin, GPT2ForTokenClassification):
    """GPT2ForTokenClassification over `IBNormGPT2Model`; loads like `IBNormGPT2LMHeadModel`."""

    config: IBNormGPT2Config
    config_class = IBNormGPT2Config

    def __init__(self, config: IBNormGPT2Config) -> None:
        super(GPT2ForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.transformer = IBNormGPT2Model(config)
        self.dropout = nn.Dropout(token_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)  # type: ignore[arg-type]
        self.post_init()


class IBNormGPT2ForQuestionAnswering(NormInitMixin, GPT2ForQuestionAnswering):
    """GPT2ForQuestionAnswering over `IBNormGPT2Model`; loads like `IBNormGPT2LMHeadModel`."""

    config: IBNormGPT2Config
    config_class = IBNormGPT2Config

    def __init__(self, config: IBNormGPT2Config) -> None:
        super(GPT2ForQuestionAnswering, self).__init__(config)
        self.num_labels = config.num_labels
        self.transformer = IBNormGPT2Model(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "IBNormGPT2DoubleHeadsModel",
    "IBNormGPT2ForQuestionAnswering",
    "IBNormGPT2ForSequenceClassification",
    "IBNormGPT2ForTokenClassification",
    "IBNormGPT2LMHeadModel",
    "IBNormGPT2Model",
]
