"""What every model family shares: where its norms sit, the function that puts them there, and their initialization."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .norms import NormBase, build_norm


@dataclass(frozen=True)
class SiteTable:
    """Where one architecture keeps its norms, relative to the base model."""

    blocks: str
    in_block: tuple[str, ...]
    final: str
    optional: tuple[tuple[str, str], ...] = ()
    """Sites in a block that exist only if the config's flag is set: (attribute, flag)."""

    def names(self, config: PreTrainedConfig) -> list[str]:
        """Every site's name in a model of this config, in order of execution."""
        extra = tuple(site for site, flag in self.optional if getattr(config, flag))
        blocks = range(config.num_hidden_layers)
        return [f"{self.blocks}.{i}.{site}" for i in blocks for site in self.in_block + extra] + [self.final]


LLAMA_SITES = SiteTable("layers", ("input_layernorm", "post_attention_layernorm"), "norm")
GPT2_SITES = SiteTable("h", ("ln_1", "ln_2"), "ln_f", (("ln_cross_attn", "add_cross_attention"),))


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm: one of ours, torch's, or Transformers' (which it names ...RMSNorm, ...LayerNorm)."""
    return isinstance(module, NormBase) or type(module).__name__.endswith("Norm")


def install_norms(model: PreTrainedModel, config: PreTrainedConfig, sites: SiteTable) -> None:
    """Put the norm that `config` names at every site of the base model `model`.

    Raises:
        RuntimeError: the norms found are not the ones expected, which means that Transformers changed the architecture.
    """
    expected = sites.names(config)
    found = [name for name, module in model.named_modules() if is_norm(module)]
    if sorted(found) != sorted(expected):
        raise RuntimeError(
            f"{type(model).__name__}: expected {len(expected)} norms, found {len(found)} "
            f"(unexpected or missing: {', '.join(sorted(set(found) ^ set(expected)))}); "
            "this release of Transformers is not one hf_ibnorm knows"
        )
    config.resolve_norms()  # fields may have been set since the config was made
    for name in expected:
        parent, _, attribute = name.rpartition(".")
        norm = build_norm(config.norm_type, config.hidden_size, **config.norm_kwargs)
        setattr(model.get_submodule(parent), attribute, norm)


class NormInitMixin:
    """Initialization of our norms inside Transformers; belongs on base models and on every class with a head.

    Loading builds models on the meta device and lets the nearest enclosing PreTrainedModel fill what the checkpoint
    lacks, non-persistent buffers included.
    """

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NormBase):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False, **kwargs) -> None:
        # In custom code, Transformers takes a module without tensors of its own for "already initialized". GPT-2's
        # attention and MLP are such modules, and would lose the 1/sqrt(2L) scaling of their output projections.
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        super()._initialize_weights(module, is_custom_code and bool(own), **kwargs)  # type: ignore[misc]
