"""Information-bottleneck and normality normalization for Hugging Face Transformers.

Importing this package makes the model type `ibnorm_X` known to the Auto classes for every model type X of Transformers.
It imports neither torch nor Transformers: public names, and the modules that have them, are imported when first used.
"""

from typing import TYPE_CHECKING

from .base.lazy import on_demand
from .swap import families, neighbours
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .configuration_ibnorm import IBNormGPT2Config as IBNormGPT2Config
    from .configuration_ibnorm import IBNormLlamaConfig as IBNormLlamaConfig
    from .convert import convert_checkpoint as convert_checkpoint
    from .data import load_corpus as load_corpus
    from .modeling_ibnorm_gpt2 import IBNormGPT2DoubleHeadsModel as IBNormGPT2DoubleHeadsModel
    from .modeling_ibnorm_gpt2 import IBNormGPT2ForQuestionAnswering as IBNormGPT2ForQuestionAnswering
    from .modeling_ibnorm_gpt2 import IBNormGPT2ForSequenceClassification as IBNormGPT2ForSequenceClassification
    from .modeling_ibnorm_gpt2 import IBNormGPT2ForTokenClassification as IBNormGPT2ForTokenClassification
    from .modeling_ibnorm_gpt2 import IBNormGPT2LMHeadModel as IBNormGPT2LMHeadModel
    from .modeling_ibnorm_gpt2 import IBNormGPT2Model as IBNormGPT2Model
    from .modeling_ibnorm_llama import IBNormLlamaForCausalLM as IBNormLlamaForCausalLM
    from .modeling_ibnorm_llama import IBNormLlamaForQuestionAnswering as IBNormLlamaForQuestionAnswering
    from .modeling_ibnorm_llama import IBNormLlamaForSequenceClassification as IBNormLlamaForSequenceClassification
    from .modeling_ibnorm_llama import IBNormLlamaForTokenClassification as IBNormLlamaForTokenClassification
    from .modeling_ibnorm_llama import IBNormLlamaModel as IBNormLlamaModel
    from .norms import NORMS as NORMS
    from .norms import DynamicTanh as DynamicTanh
    from .norms import IBNorm as IBNorm
    from .norms import LayerNormalNorm as LayerNormalNorm
    from .norms import Measure as Measure
    from .norms import NormBase as NormBase
    from .norms import build_norm as build_norm
    from .norms import register_norm as register_norm
    from .swap.optim import no_decay_parameter_names as no_decay_parameter_names
    from .swap.optim import set_lam as set_lam
    from .swap.patching import apply_norm as apply_norm
    from .swap.patching import describe_sites as describe_sites
    from .swap.patching import norm_sites as norm_sites
    from .swap.patching import restore_norm as restore_norm
    from .swap.patching import swapped_norms as swapped_norms

_HOMES = {
    "configuration_ibnorm": ("IBNormGPT2Config", "IBNormLlamaConfig"),
    "convert": ("convert_checkpoint",),
    "data": ("load_corpus",),
    "modeling_ibnorm_gpt2": (
        "IBNormGPT2DoubleHeadsModel",
        "IBNormGPT2ForQuestionAnswering",
        "IBNormGPT2ForSequenceClassification",
        "IBNormGPT2ForTokenClassification",
        "IBNormGPT2LMHeadModel",
        "IBNormGPT2Model",
    ),
    "modeling_ibnorm_llama": (
        "IBNormLlamaForCausalLM",
        "IBNormLlamaForQuestionAnswering",
        "IBNormLlamaForSequenceClassification",
        "IBNormLlamaForTokenClassification",
        "IBNormLlamaModel",
    ),
    "norms": (
        *("NORMS", "DynamicTanh", "IBNorm", "LayerNormalNorm", "Measure", "NormBase", "build_norm", "register_norm"),
    ),
    "swap.optim": ("no_decay_parameter_names", "set_lam"),
    "swap.patching": ("apply_norm", "describe_sites", "norm_sites", "restore_norm", "swapped_norms"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)
if not TYPE_CHECKING:  # a type checker would take every name for one of the package's
    __getattr__, __dir__ = on_demand(__name__, _HOMES, {families.PREFIX: families.stand_in})

families.register()
neighbours.register()
