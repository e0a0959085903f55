"""What every model family shares: norms put in place, initialized, loaded, saved; unsafe checkpointing refused."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel, modeling_utils
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import modeling_auto

from .configuration_ibnorm import STOCK
from .norm_base import NormBase, rounded, shortest
from .norms import build_resolved, ramped_options
from .sites import HEAD, KINDS, STREAM, Pin, base_prefix, discover, eps_of, norm_modules, place_of, width_of_norm

_LANGUAGE_MODELS = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
OURS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}
"""Stock class → the class with our norms that stands in for it (of those that have been made)."""


def ours(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class with our norms that stands in for a stock class; itself where there is none.

    In the package one is made where there is none yet. The code that travels with a checkpoint has those of its family.
    """
    if stock not in OURS and "hf_ibnorm" in sys.modules and not issubclass(stock, NormModelMixin):
        OURS[stock] = import_module("hf_ibnorm.swap.families").stand_in(stock)
    return OURS.get(stock, stock)


def site_kinds(model: PreTrainedModel, pin: Pin | None) -> dict[str, str]:
    """Kind of every site whose norm a config can choose, by name, in the order in which the modules were made.

    Args:
        model: stock or ours, base model or with a head.
        pin: of its architecture, if that is pinned.

    Raises:
        RuntimeError: the norms of the model are not what is pinned for its architecture.
    """
    if pin is None:
        return {site.name: site.kind for site in discover(model) if site.problem is None}
    pinned, sites = pin.names(model.config), list(norm_modules(model.base_model))
    if sorted(sites) != sorted(pinned):
        raise RuntimeError(
            f"{type(model.base_model).__name__}: expected {len(pinned)} norms, found {len(sites)} "
            f"(unexpected or missing: {', '.join(sorted(set(sites) ^ set(pinned)))}); either the model was changed "
            "(PEFT wraps norms that are trained), or this release of Transformers is not one hf_ibnorm knows"
        )
    return dict.fromkeys(pinned, STREAM)


def install_norms(model: PreTrainedModel, config: Any, kinds: Iterable[str] = KINDS) -> None:
    """Put the norm that `config` chooses for it at every site of a model.

    Args:
        model: base model or with a head.
        config: one of ours.
        kinds: of the sites that are filled.

    Raises:
        RuntimeError: the norms found are not the ones expected, which means that Transformers changed the architecture.
        ValueError: a glob of the config matches no site.
    """
    config.resolve_norms()  # fields may have been set since the config was made
    sites = site_kinds(model, config.norm_pin)
    if config.norms_were_given or not config.architectures:  # a checkpoint's may be of the norms of another head
        for glob, _ in config.norm_overrides:
            check_glob(f"norm_overrides[{glob!r}]:", glob, sites)
    for site, kind in sites.items():
        if kind in kinds and config.norm_at(site, kind)[0] != STOCK:
            old = model.get_submodule(qualified(model, site))
            new = build_site(config, site, old, kind)
            for name in ("weight", "bias"):  # some models begin with other gains than 1
                value, place = getattr(old, name, None), getattr(new, name, None)
                if value is not None and place is not None and not value.is_meta:
                    place.data.copy_(value.data)
            set_site(model, site, new)


def check_glob(what: str, glob: str, sites: Collection[str]) -> None:
    """Raise ValueError, beginning with `what`, unless `glob` matches one of `sites`."""
    if not any(fnmatchcase(site, glob) for site in sites):
        raise ValueError(f"{what} matches no site; sites are {', '.join(sites)}")


def build_site(config: Any, site: str, old: nn.Module | None = None, kind: str = STREAM, **factory: Any) -> nn.Module:
    """The norm that `config` chooses for a site.

    Args:
        config: one of ours.
        site: its name.
        old: the norm there, which says width, gain and area, and ε where the config leaves that open; None for a norm
            as wide as the model.
        kind: of the site.
        **factory: device and dtype.
    """
    name, options = config.norm_at(site, kind)
    width = None if old is None else width_of_norm(old)
    place = {} if old is None else place_of(old)
    if old is not None and "eps" in options and options["eps"] is None:
        options = {**options, "eps": eps_of(old)}
    return build_resolved(name, width or config.hidden_size, options, **place, **factory)


def qualified(model: PreTrainedModel, site: str) -> str:
    """Name in `model` of the module at a site; sites outside the base model have that as their name."""
    try:
        model.base_model.get_submodule(site)
    except AttributeError:
        return site
    return f"{base_prefix(model)}{site}"


def set_site(model: PreTrainedModel, site: str, norm: nn.Module) -> None:
    """Put `norm` at a site of a model."""
    parent, _, attribute = qualified(model, site).rpartition(".")
    setattr(model.get_submodule(parent), attribute, norm)


def ramped_norms(model: PreTrainedModel) -> Iterator[tuple[str, NormBase, float]]:
    """Yields (site, norm, value in the config) for every norm with an option that training can ramp."""
    for name, norm in norm_modules(model).items():
        # PEFT wraps norms that are trained: the original, and a copy of it for each adapter.
        site = name.removesuffix(".original_module")
        if not isinstance(norm, NormBase) or norm.ramp is None or ".modules_to_save." in name:
            continue
        if norm.ramp in (options := model.config.norm_at(site)[1]):  # else somebody put the norm there by hand
            yield site, norm, options[norm.ramp]


def _keys_of_ramped(model: PreTrainedModel) -> dict[str, bool]:
    """State-dict key of every ramped option that is possible at a site → whether the model has that buffer."""
    norms = {qualified(model, site): norm for site, norm in norm_modules(model).items()}
    return {f"{name}.{o}": o in dict(norm.named_buffers()) for name, norm in norms.items() for o in ramped_options()}


def record_ramped(model: PreTrainedModel, state_dict: Mapping[str, Any] | None = None) -> None:
    """Write each site's ramped option into the config: from `state_dict` where that has it, else from the norm.

    Needed because `set_ramped`, and `set_lam` on a part of a model, change the norms alone.
    """
    config, overrides = model.config, list(model.config.norm_overrides or [])
    values: dict[int, dict[str, float]] = {}
    """Index in `norm_overrides` (-1: `norm_type`) → site → value."""
    options: dict[int, str] = {}
    for site, norm, _ in ramped_norms(model):
        value, saved = norm.ramped, (state_dict or {}).get(f"{qualified(model, site)}.{norm.ramp}")
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


def same_ramped(wanted: float, held: Tensor) -> bool:
    """Whether config and weights have the same ramped option, within the precision of the weights' dtype.

    Tools that cast the weights of a checkpoint cast the option with them, and leave the config.
    """
    return held.item() in [rounded(wanted, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def settle_ramped(model: PreTrainedModel) -> None:
    """After loading, make norms and config agree on the ramped options.

    An option given to `from_pretrained` wins. Where config.json and weights differ by rounding, the config wins.

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
        if not chosen and not same_ramped(wanted, norm.held):
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


def _convert_as_stock(cls: Any) -> None:
    """Let loading rename and merge the tensors of a checkpoint for a class of ours as it does for the stock class."""
    config = cls.config_class
    for own, stock in ((cls.__name__, cls.stock.__name__), (config.model_type, config.stock_model_type)):
        if (mapping := get_checkpoint_conversion_mapping(stock)) is not None:
            register_checkpoint_conversion_mapping(own, mapping, overwrite=True)


def mark_parts(model: Any) -> None:
    """Note on the models inside of a model of ours that they are its parts; but for the base model."""
    for module in model.modules():
        if isinstance(module, NormModelMixin):
            module.is_part = module is not model and module is not model.base_model


class NormModelMixin:
    """Our norms inside Transformers: building, initialization, loading, saving. On base models and classes with a head.

    A class of ours derives from this one and the stock class, and has a config of ours as its `config_class`. The stock
    model is built first, as it always is; then models nested in it become instances of our classes, and the norms of
    the config take the places of the stock ones. No random number is drawn for them.

    Loading builds models on the meta device and lets the nearest enclosing PreTrainedModel fill what the checkpoint
    lacks, non-persistent buffers included.
    """

    stock: ClassVar[Any]
    """The stock class that a class of ours stands in for."""
    is_part = False
    """Whether this is a part of a model whose config chooses its norms: neither the whole nor the base model."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if NormModelMixin in cls.__bases__:
            stock: Any = cls.__bases__[1]
            cls.stock = stock
            OURS[stock] = cls  # type: ignore[assignment]
            # Transformers notes in the constructor, by class name, what hidden states to record; a nested model still
            # has its stock class then.
            registry: dict[str, Any] = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {})
            dict.__setitem__(registry, str(cls), getattr(stock, "_can_record_outputs", None))
            _name_beside_stock(cls)
            _convert_as_stock(cls)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(config, "norm_at"):
            raise TypeError(f"config: got {type(config).__name__}, {type(self).__name__} takes one with norms")
        if type(config) not in MODEL_MAPPING:  # of a checkpoint's own code; some heads ask AutoModel for their model
            name = modeling_auto.MODEL_MAPPING_NAMES.get(config.stock_model_type)
            if base_class := next((own for stock, own in OURS.items() if stock.__name__ == name), None):
                AutoModel.register(type(config), base_class, exist_ok=True)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        # Where AutoModel made the base model, that is one of ours, with its norms.
        is_filled = model.base_model is not self and isinstance(model.base_model, NormModelMixin)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.__class__ = ours(type(module))
        mark_parts(model)
        if model.loss_type is None and self.stock.__name__ == _LANGUAGE_MODELS.get(config.stock_model_type):
            # Transformers picks a loss by class name and would warn, breaking torch.compile(fullgraph=True).
            model.loss_type = "ForCausalLM"
        install_norms(model, config, (HEAD,) if is_filled else KINDS)
        # Stock and older checkpoints have no ramped option.
        ignored = [f"^{re.escape(key)}$" for key, is_buffer in _keys_of_ramped(model).items() if is_buffer]
        model._keys_to_ignore_on_load_missing = [*(model._keys_to_ignore_on_load_missing or ()), *ignored]
        model.post_init()  # touches the new norms only

    @classmethod
    def is_custom_code(cls) -> bool:
        # Else Transformers would not rename and merge the tensors of a nested model as it does for the stock class.
        return cls.stock.is_custom_code()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Transformers looks for attention in the source of the class's module.
        return cls.stock._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.stock._can_set_experts_implementation()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NormBase) or type(module) in (nn.LayerNorm, nn.RMSNorm):
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
        if self.is_part:
            raise ValueError(
                f"model: this {type(self).__name__} is a part of a model, and its config does not name its norms; save "
                "the whole model"
            )
        state_dict = kwargs.get("state_dict", args[2] if len(args) > 2 else None)
        record_ramped(self, state_dict)  # type: ignore[arg-type]
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            record_ramped(self)  # type: ignore[arg-type]

    def load_state_dict(self, *args, **kwargs) -> Any:
        loaded = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        if not self.is_part:
            record_ramped(self)  # type: ignore[arg-type]
        return loaded

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        if self.config.norms_were_given:  # type: ignore[attr-defined]  # they may have no ramped option
            keys = _keys_of_ramped(self)  # type: ignore[arg-type]
            loading_info.unexpected_keys = {key for key in loading_info.unexpected_keys if key not in keys}

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)  # type: ignore[misc]
        try:
            check_checkpointing(self, self.modules())  # type: ignore[arg-type, attr-defined]
        except ValueError:
            super()._set_gradient_checkpointing(False)  # type: ignore[misc]
            raise


def model_for(name: str, stock: type[PreTrainedModel], config: Any, module: str) -> type[PreTrainedModel]:
    """A model's class with the norms of its config, for any architecture of Transformers.

    Args:
        name: of the class.
        stock: the stock model's class.
        config: the class of its configs.
        module: where the class is found by its name, when it is unpickled.
    """
    body = {"__doc__": f"{stock.__name__} with the norms of its config.", "__module__": module, "config_class": config}
    return type(name, (NormModelMixin, stock), body)


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
