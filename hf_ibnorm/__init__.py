"""Information-bottleneck and normality normalization for Hugging Face Transformers.

Importing this package registers the `ibnorm_llama` and `ibnorm_gpt2` models with the Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_ibnorm import IBNormGPT2Config, IBNormLlamaConfig
from .data import load_corpus
from .modeling_ibnorm_gpt2 import IBNormGPT2ForSequenceClassification, IBNormGPT2LMHeadModel, IBNormGPT2Model
from .modeling_ibnorm_llama import IBNormLlamaForCausalLM, IBNormLlamaForSequenceClassification, IBNormLlamaModel
from .norms import NORMS, DynamicTanh, IBNorm, LayerNormalNorm, build_norm
from .optim import no_decay_parameter_names
from .version import __version__ as __version__

for _config, _model, _lm, _classifier in (
    (IBNormLlamaConfig, IBNormLlamaModel, IBNormLlamaForCausalLM, IBNormLlamaForSequenceClassification),
    (IBNormGPT2Config, IBNormGPT2Model, IBNormGPT2LMHeadModel, IBNormGPT2ForSequenceClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _lm, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _classifier, exist_ok=True)

__all__ = [
    "NORMS",
    "DynamicTanh",
    "IBNorm",
    "IBNormGPT2Config",
    "IBNormGPT2ForSequenceClassification",
    "IBNormGPT2LMHeadModel",
    "IBNormGPT2Model",
    "IBNormLlamaConfig",
    "IBNormLlamaForCausalLM",
    "IBNormLlamaForSequenceClassification",
    "IBNormLlamaModel",
    "LayerNormalNorm",
    "build_norm",
    "load_corpus",
    "no_decay_parameter_names",
]
