"""What every model family shares: putting its norms in place, initializing, loading and saving them, and the guards."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto import modeling_auto

from .norms import IBNorm, NormBase, build_norm, rounded, shortest


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


def lam_keys(model: PreTrainedModel) -> dict[str, bool]:
    """The keys that λ has or would have in the state dict of `model`, one for each site → whether it has one there."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    sites = model.config.norm_site_table.names(model.config)
    norms = {site: model.base_model.get_submodule(site) for site in sites}
    return {f"{prefix}{site}.lam": isinstance(norm, IBNorm) and norm.lam is not None for site, norm in norms.items()}


def norms_with_lam(model: PreTrainedModel) -> Iterator[tuple[str, Any, float]]:
    """Of each site whose norm has a λ: its name, the norm, and the λ that the config gives it."""
    for site in model.config.norm_site_table.names(model.config):
        norm: Any = model.base_model.get_submodule(site)
        if isinstance(norm, IBNorm) and "lam" in (options := model.config.norm_at(site)[1]):
            yield site, norm, options["lam"]


def record_lam(model: PreTrainedModel, state_dict: Mapping[str, Any] | None = None) -> None:
    """Let the config say each site's λ as it is: in `state_dict` where that has it, else in the model.

    A norm's `set_lam`, or one on a part of the model, does not change the config.
    """
    config, overrides = model.config, list(model.config.norm_overrides or [])
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    lams: dict[int, dict[str, float]] = {}
    """Place of an override, -1 for the norm of all others → the sites that it decides → λ."""
    for site, norm, _ in norms_with_lam(model):
        lam, saved = norm.lam_value, (state_dict or {}).get(f"{prefix}{site}.lam")
        if isinstance(saved, Tensor) and not saved.is_meta and saved.item() != rounded(lam, saved.dtype):
            lam = shortest(saved.item())
        place = max((i for i, (glob, _) in enumerate(overrides) if fnmatchcase(site, glob)), default=-1)
        lams.setdefault(place, {})[site] = lam
    for place, found in lams.items():
        glob, entry = overrides[place] if place >= 0 else ("", {"type": config.norm_type, "kwargs": config.norm_kwargs})
        most = Counter(found.values()).most_common(1)[0][0]
        by_lam = {lam: {**entry, "kwargs": {**entry["kwargs"], "lam": lam}} for lam in found.values()}
        if place >= 0:
            overrides[place] = [glob, by_lam[most]]
        else:
            config.norm_kwargs = by_lam[most]["kwargs"]
        overrides += [[site, by_lam[lam]] for site, lam in found.items() if lam != most]
    config.norm_overrides = overrides


def agree(wanted: float, held: Tensor) -> bool:
    """Whether a config's λ and the one that weights hold are the same, as far as the weights tell.

    Tools that cast the weights of a checkpoint cast λ with them, and leave the config.
    """
    return held.item() in [rounded(wanted, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def settle_lam(model: PreTrainedModel) -> None:
    """See to it that a model just loaded has the λ that its config says.

    Where an argument of loading chose another norm or another λ for a site, that holds. Elsewhere the checkpoint's
    weights and its config must say the same.

    Raises:
        ValueError: they do not.
    """
    config, on_file = model.config, model.config.norms_on_file()
    for site, norm, wanted in norms_with_lam(model):
        if norm.lam_value == wanted or norm.lam is None:
            continue
        before, options = (None, {}) if on_file is None else on_file.norm_at(site)
        chosen = config.lam_was_given or before != config.norm_at(site)[0] or options.get("lam") != wanted
        if not chosen and not agree(wanted, norm.lam):
            raise ValueError(
                f"lam: the checkpoint's config has {wanted} at {site}, its weights {norm.lam_value}: they are of "
                f"different models; set lam in the norm_kwargs of its config.json to the one that is meant, or give it "
                f"in loading, such as norm_kwargs={{'lam': {norm.lam_value}}}"
            )
        norm.set_lam(wanted)


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
        settle_lam(model)
        if model.config.norms_were_given:
            forget_origin(model)
        model.config.forget_given()
        return loaded

    def save_pretrained(self, *args, **kwargs) -> Any:
        state_dict = kwargs.get("state_dict", args[2] if len(args) > 2 else None)
        record_lam(self, state_dict)  # type: ignore[arg-type]
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            record_lam(self)  # type: ignore[arg-type]

    def load_state_dict(self, *args, **kwargs) -> Any:
        loaded = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        record_lam(self)  # type: ignore[arg-type]
        return loaded

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        # Stock and older checkpoints have no λ, and another norm that is asked for may have no place for one.
        keys = lam_keys(self)  # type: ignore[arg-type]
        loading_info.missing_keys = {key for key in loading_info.missing_keys if not keys.get(key)}
        if self.config.norms_were_given:  # type: ignore[attr-defined]
            loading_info.unexpected_keys = {key for key in loading_info.unexpected_keys if key not in keys}

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
