"""Information-bottleneck and normality normalization for Hugging Face Transformers.

Importing this package registers the `ibnorm_llama` and `ibnorm_gpt2` models with the Auto classes.
"""

from . import kernels as kernels  # registers torch.ops.hf_ibnorm
from .configuration_ibnorm import IBNormGPT2Config, IBNormLlamaConfig
from .convert import convert_checkpoint
from .data import load_corpus
from .families import register
from .modeling_ibnorm_gpt2 import IBNormGPT2ForSequenceClassification, IBNormGPT2LMHeadModel, IBNormGPT2Model
from .modeling_ibnorm_llama import IBNormLlamaForCausalLM, IBNormLlamaForSequenceClassification, IBNormLlamaModel
from .norms import NORMS, DynamicTanh, IBNorm, LayerNormalNorm, build_norm
from .optim import no_decay_parameter_names, set_lam
from .patching import apply_norm, norm_sites, restore_norm, swapped_norms
from .version import __version__ as __version__

register()

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
    "apply_norm",
    "build_norm",
    "convert_checkpoint",
    "load_corpus",
    "no_decay_parameter_names",
    "norm_sites",
    "restore_norm",
    "set_lam",
    "swapped_norms",
]
