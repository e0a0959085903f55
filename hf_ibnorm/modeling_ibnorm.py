"""What every model family shares: putting its norms in place, initializing, loading and saving them, and the guards."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto import modeling_auto

from .norms import NormBase, build_norm


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm: one of ours, torch's, or Transformers' (which it names ...RMSNorm, ...LayerNorm)."""
    return isinstance(module, NormBase) or type(module).__name__.endswith("Norm")


def check_sites(base: nn.Module, expected: list[str]) -> None:
    """Raise RuntimeError unless the norms in the base model `base` are those at the `expected` names."""
    found = [name for name, module in base.named_modules(remove_duplicate=False) if is_norm(module)]
    if sorted(found) != sorted(expected):
        raise RuntimeError(
            f"{type(base).__name__}: expected {len(expected)} norms, found {len(found)} "
            f"(unexpected or missing: {', '.join(sorted(set(found) ^ set(expected)))}); either the model was changed "
            "(PEFT wraps norms that are trained), or this release of Transformers is not one hf_ibnorm knows"
        )


def install_norms(base: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Put the norm that `config` chooses for it at every site of the base model `base`.

    Raises:
        TypeError: `config` is a stock one.
        RuntimeError: the norms found are not the ones expected, which means that Transformers changed the architecture.
    """
    if not hasattr(config, "norm_site_table"):
        raise TypeError(f"config: got {type(config).__name__}, {type(base).__name__} takes one with norms")
    sites = config.norm_site_table.names(config)
    check_sites(base, sites)
    config.resolve_norms()  # fields may have been set since the config was made
    for site in sites:
        set_site(base, site, build_site(config, site))


def build_site(config: PreTrainedConfig, site: str, **factory: Any) -> nn.Module:
    """The norm that `config` chooses for `site`; `factory` is device and dtype."""
    name, options = config.norm_at(site)
    return build_norm(name, config.hidden_size, **options, **factory)


def set_site(base: nn.Module, site: str, norm: nn.Module) -> None:
    parent, _, attribute = site.rpartition(".")
    setattr(base.get_submodule(parent), attribute, norm)


def record_lam(model: PreTrainedModel) -> None:
    """Let the config say each site's λ as it is: a norm's `set_lam`, or one on a part of the model, does not."""
    config = model.config
    for site in config.norm_site_table.names(config):
        name, options = config.norm_at(site)
        lam = getattr(model.base_model.get_submodule(site), "lam_value", None)
        if "lam" in options and lam not in (None, options["lam"]):
            config.norm_overrides = [*config.norm_overrides, [site, {"type": name, "kwargs": {**options, "lam": lam}}]]


def token_dropout(config: Any) -> float:
    """The share that a stock token classifier drops of what goes into its head."""
    given = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
    return next((share for share in given if share is not None), 0.1)


def forget_origin(model: PreTrainedModel) -> None:
    """Clear `name_or_path`: PEFT would note that checkpoint, which has other norms, as the base of an adapter."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = module.config.name_or_path = ""


def _name_beside_stock(cls: Any) -> None:
    """Enter a class of ours in Transformers' tables of names that hold the stock class it stands in for.

    Transformers and others choose by them: a language model that is not in them is trained on labels that are not
    shifted, where they are smoothed. `families` has entered the names; for a checkpoint's own code nobody has.
    """
    stock, config = cls.__bases__[1].__name__, cls.config_class
    for name, table in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES") and table.get(config.stock_model_type) == stock:
            table.setdefault(config.model_type, cls.__name__)


class NormInitMixin:
    """Our norms inside Transformers: initialization, loading, saving. On base models and on every class with a head.

    Loading builds models on the meta device and lets the nearest enclosing PreTrainedModel fill what the checkpoint
    lacks, non-persistent buffers included.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if NormInitMixin in cls.__bases__:
            _name_beside_stock(cls)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NormBase):
            module.reset_parameters()
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            # Some releases of Transformers take it that these have a gain and a bias.
            for name, fill in (("weight", init.ones_), ("bias", init.zeros_)):
                if getattr(module, name, None) is not None:
                    fill(getattr(module, name))
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False, **kwargs) -> None:
        # In custom code, Transformers takes a module without tensors of its own for "already initialized". GPT-2's
        # attention and MLP are such modules, and would lose the 1/sqrt(2L) scaling of their output projections.
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        super()._initialize_weights(module, is_custom_code and bool(own), **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.norms_were_given:
            forget_origin(model)
        return loaded

    def save_pretrained(self, *args, **kwargs) -> Any:
        record_lam(self)  # type: ignore[arg-type]
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)  # type: ignore[misc]
        try:
            check_checkpointing(self, self.modules())  # type: ignore[arg-type, attr-defined]
        except ValueError:
            super()._set_gradient_checkpointing(False)  # type: ignore[misc]
            raise


def check_checkpointing(model: nn.Module, norms: Iterable[nn.Module]) -> None:
    """Refuse gradient checkpointing that recomputes with other noise than the forward pass had.

    The loss would be the same and the gradients silently wrong.

    Raises:
        ValueError: one of `norms` draws noise and `model` checkpoints with `preserve_rng_state=False`.
    """
    noisy = any(isinstance(norm, NormBase) and norm.draws_noise for norm in norms)
    for module in model.modules() if noisy else ():
        function: Callable | None = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and (
            getattr(function, "keywords", {}).get("preserve_rng_state") is False
        ):
            raise ValueError(
                "preserve_rng_state: got False with a norm that draws noise, which makes gradients silently wrong; "
                "must be True (the default)"
            )
