"""What every model family shares: norms put in place, initialized, loaded, saved; unsafe checkpointing refused."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel, modeling_utils
from transformers.models.auto import modeling_auto

from .norm_base import NormBase, rounded, shortest
from .norms import build_resolved, ramped_options
from .sites import STREAM, Pin, discover, is_norm, width_of_norm

_LANGUAGE_MODELS = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
OURS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}
"""Stock class → the class with our norms that stands in for it (of imported families only)."""


def install_norms(base: PreTrainedModel, config: Any) -> None:
    """Put the norm that `config` chooses for it at every site of the base model `base`.

    Raises:
        RuntimeError: the norms found are not the ones expected, which means that Transformers changed the architecture.
    """
    config.resolve_norms()  # fields may have been set since the config was made
    for site in check_sites(base, config, config.norm_pin):
        set_site(base, site, build_site(config, site, width_of_norm(base.get_submodule(site))))


def site_names(base: nn.Module, config: Any, pin: Pin | None) -> list[str]:
    """The sites of a base model whose norms its config chooses, relative to it, in order of execution.

    Args:
        base: stock or ours.
        config: of `base`.
        pin: of its architecture, if that is pinned.
    """
    if pin is not None:
        return pin.names(config)
    return [site.name for site in discover(base) if site.kind == STREAM]


def _sites(model: PreTrainedModel) -> list[str]:
    """The sites of one of our models."""
    return site_names(model.base_model, model.config, model.config.norm_pin)


def check_sites(base: nn.Module, config: Any, pin: Pin | None) -> list[str]:
    """`site_names`, which must be there.

    Raises:
        RuntimeError: the norms of the model are not what is pinned for its architecture.
        ValueError: a glob of the config matches no site.
    """
    pinned = site_names(base, config, pin)
    if pin is None:
        for glob, _ in getattr(config, "norm_overrides", None) or []:
            if not any(fnmatchcase(site, glob) for site in pinned):
                raise ValueError(f"norm_overrides[{glob!r}]: matches no site; sites are {', '.join(pinned)}")
        return pinned
    sites = [name for name, module in base.named_modules(remove_duplicate=False) if is_norm(module)]
    if sorted(sites) != sorted(pinned):
        raise RuntimeError(
            f"{type(base).__name__}: expected {len(pinned)} norms, found {len(sites)} "
            f"(unexpected or missing: {', '.join(sorted(set(sites) ^ set(pinned)))}); either the model was changed "
            "(PEFT wraps norms that are trained), or this release of Transformers is not one hf_ibnorm knows"
        )
    return pinned


def build_site(config: Any, site: str, width: int | None = None, **factory: Any) -> nn.Module:
    """The norm that `config` chooses for `site`; of the model's width by default, `factory` is device and dtype."""
    name, options = config.norm_at(site)
    return build_resolved(name, width or config.hidden_size, options, **factory)


def set_site(base: nn.Module, site: str, norm: nn.Module) -> None:
    """Put `norm` at a site of the base model."""
    parent, _, attribute = site.rpartition(".")
    setattr(base.get_submodule(parent), attribute, norm)


def ramped_norms(model: PreTrainedModel) -> Iterator[tuple[str, NormBase, float]]:
    """Yields (site, norm, value in the config) for every norm with an option that training can ramp."""
    for site in _sites(model):
        norm: Any = model.base_model.get_submodule(site)
        norm = getattr(norm, "original_module", norm)  # PEFT wraps norms that are trained
        if isinstance(norm, NormBase) and norm.ramp is not None:
            yield site, norm, model.config.norm_at(site)[1][norm.ramp]


def _keys_of_ramped(model: PreTrainedModel) -> dict[str, bool]:
    """State-dict key of every ramped option that is possible at a site → whether the model has that buffer."""
    prefix = prefix_of(model)
    keys = {f"{prefix}{site}.{o}": False for site in _sites(model) for o in ramped_options()}
    return keys | {f"{prefix}{site}.{norm.ramp}": norm.held is not None for site, norm, _ in ramped_norms(model)}


def prefix_of(model: PreTrainedModel) -> str:
    """What names of the base model's tensors begin with in the state dict of `model`."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def record_ramped(model: PreTrainedModel, state_dict: Mapping[str, Any] | None = None) -> None:
    """Write each site's ramped option into the config: from `state_dict` where that has it, else from the norm.

    The norms own it: a norm's `set_ramped`, or `set_lam` on a part of the model, does not change the config.
    """
    config, overrides = model.config, list(model.config.norm_overrides or [])
    prefix = prefix_of(model)
    values: dict[int, dict[str, float]] = {}
    """Place of an override, -1 for the norm of all other sites → the sites that it decides → value."""
    options: dict[int, str] = {}
    for site, norm, _ in ramped_norms(model):
        value, saved = norm.ramped, (state_dict or {}).get(f"{prefix}{site}.{norm.ramp}")
        if isinstance(saved, Tensor) and not saved.is_meta and saved.item() != rounded(value, saved.dtype):
            value = shortest(saved.item())
        place = max((i for i, (glob, _) in enumerate(overrides) if fnmatchcase(site, glob)), default=-1)
        values.setdefault(place, {})[site] = value
        options[place] = str(norm.ramp)
    for place, of_sites in values.items():
        glob, entry = overrides[place] if place >= 0 else ("", {"type": config.norm_type, "kwargs": config.norm_kwargs})
        most = Counter(of_sites.values()).most_common(1)[0][0]
        entries = {v: {**entry, "kwargs": {**entry["kwargs"], options[place]: v}} for v in of_sites.values()}
        if place >= 0:
            overrides[place] = [glob, entries[most]]
        else:
            config.norm_kwargs = entries[most]["kwargs"]
        overrides += [[site, entries[value]] for site, value in of_sites.items() if value != most]
    config.norm_overrides = overrides


def agree(wanted: float, held: Tensor) -> bool:
    """Whether config and weights have the same ramped option, within the precision of the weights' dtype.

    Tools that cast the weights of a checkpoint cast the option with them, and leave the config.
    """
    return held.item() in [rounded(wanted, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def settle_ramped(model: PreTrainedModel) -> None:
    """After loading, make norms and config agree on the ramped options.

    An option given to `from_pretrained` wins. Otherwise config.json and weights must agree.

    Raises:
        ValueError: config.json and weights disagree.
    """
    config = model.config
    on_file = config.norms_on_file() if config.norms_were_given else config
    for site, norm, wanted in ramped_norms(model):
        if norm.ramped == wanted or norm.held is None:
            continue
        before, options = (None, {}) if on_file is None else on_file.norm_at(site)
        chosen = config.ramped_was_given or before != config.norm_at(site)[0] or options.get(norm.ramp) != wanted
        if not chosen and not agree(wanted, norm.held):
            raise ValueError(
                f"{norm.ramp}: the checkpoint's config has {wanted} at {site}, its weights {norm.ramped}: they are of "
                f"different models; set {norm.ramp} in the norm_kwargs of its config.json to the one that is meant, or "
                f"give it in loading, such as norm_kwargs={{'{norm.ramp}': {norm.ramped}}}"
            )
        norm.set_ramped(wanted)


def forget_origin(model: PreTrainedModel) -> None:
    """Clear `name_or_path`: PEFT would note that checkpoint, which has other norms, as the base of an adapter."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = module.config.name_or_path = ""


def _name_beside_stock(cls: Any) -> None:
    """Enter a class of ours in Transformers' tables of names that hold the stock class it stands in for.

    Trainer shifts smoothed labels only for class names in these tables. `families` enters the package's names; a
    checkpoint's own code must do so here.
    """
    stock, config = cls.__bases__[1].__name__, cls.config_class
    for name, table in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES") and table.get(config.stock_model_type) == stock:
            table.setdefault(config.model_type, cls.__name__)


class NormModelMixin:
    """Our norms inside Transformers: building, initialization, loading, saving. On base models and classes with a head.

    A class of ours derives from this one and the stock class, and has a config of ours as its `config_class`. The stock
    model is built first, as it always is; then models nested in it become instances of our classes, and the norms of
    the config take the places of the stock ones. No random number is drawn for them.

    Loading builds models on the meta device and lets the nearest enclosing PreTrainedModel fill what the checkpoint
    lacks, non-persistent buffers included.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if NormModelMixin in cls.__bases__:
            stock: Any = cls.__bases__[1]
            OURS[stock] = cls  # type: ignore[assignment]
            # Transformers notes in the constructor, by class name, what hidden states to record; a nested model still
            # has its stock class then.
            registry: dict[str, Any] = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {})
            dict.__setitem__(registry, str(cls), getattr(stock, "_can_record_outputs", None))
            _name_beside_stock(cls)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(config, "norm_at"):
            raise TypeError(f"config: got {type(config).__name__}, {type(self).__name__} takes one with norms")
        if type(config) not in MODEL_MAPPING:  # of a checkpoint's own code; some heads ask AutoModel for their model
            name = modeling_auto.MODEL_MAPPING_NAMES[config.stock_model_type]
            AutoModel.register(type(config), next(o for s, o in OURS.items() if s.__name__ == name), exist_ok=True)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        base = model.base_model
        is_new = base is self or type(base) in OURS  # AutoModel makes one of ours
        for module in model.modules():
            module.__class__ = OURS.get(type(module), type(module))
        stock = type(self).__mro__[type(self).__mro__.index(NormModelMixin) + 1].__name__
        if model.loss_type is None and stock == _LANGUAGE_MODELS.get(config.stock_model_type):
            # Transformers picks a loss by class name and would warn, breaking torch.compile(fullgraph=True).
            model.loss_type = "ForCausalLM"
        if is_new:
            install_norms(base, config)
        model.post_init()  # touches the new norms only

    def _init_weights(self, module: nn.Module) -> None:
        if is_norm(module) and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]  # Transformers assumes that norms have a gain and a bias
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
        settle_ramped(model)
        if model.config.norms_were_given:
            forget_origin(model)
        model.config.forget_given()
        return loaded

    def save_pretrained(self, *args, **kwargs) -> Any:
        state_dict = kwargs.get("state_dict", args[2] if len(args) > 2 else None)
        record_ramped(self, state_dict)  # type: ignore[arg-type]
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            record_ramped(self)  # type: ignore[arg-type]

    def load_state_dict(self, *args, **kwargs) -> Any:
        loaded = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        record_ramped(self)  # type: ignore[arg-type]
        return loaded

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        # Stock and older checkpoints have no ramped option, and another norm that is asked for may have none.
        keys = _keys_of_ramped(self)  # type: ignore[arg-type]
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
    noisy = any(getattr(norm, "draws_noise", False) for norm in norms)
    for module in model.modules() if noisy else ():
        function: Callable | None = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and (
            getattr(function, "keywords", {}).get("preserve_rng_state") is False
        ):
            raise ValueError(
                "preserve_rng_state: got False with a norm that draws noise, which makes gradients silently wrong; "
                "must be True (the default)"
            )
