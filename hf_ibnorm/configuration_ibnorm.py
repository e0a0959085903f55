"""Configs with norms: the stock ones plus `norm_type`, `norm_kwargs` and `norm_overrides`.

The norms are resolved when a config is made: names become the registry's spelling and every norm holds every option
with its value, so that a later change of a default never changes an old checkpoint. A config chooses the norm of each
site; the sites are read off the model, for Llama and GPT-2 from `sites.PINS`.
"""

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from .norms import NORMS, norm_name, ramped_options, resolve_norm_kwargs
from .sites import EPS_FIELDS, PINS, STREAM, Pin

DEFAULT_NORM = "ibnorm_l"
STOCK = "stock"
"""In place of a norm's name: the norm that the architecture has."""
NORM_FIELDS = ("norm_type", "norm_kwargs", "norm_overrides")
_OTHER_NORMS = "_norms_were_given"
_ARGUMENTS = ("norm", "sites", "variant")  # of apply_norm and IBNorm


def _option_names() -> set[str]:
    """The options of every norm there is."""
    return {option for entry in NORMS.values() for option in entry.defaults}


def _strays(cls: Any, keys: Iterable[str]) -> list[str]:
    """The names among `keys` that look like options of a norm and are no field of a config's class."""
    options, fields = {*_option_names(), *_ARGUMENTS}, {*NORM_FIELDS, *cls.__dataclass_fields__}
    return [key for key in keys if (key in options or key.startswith("norm_")) and key not in fields]


def _refuse_strays(cls: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for a misplaced norm option: Transformers would keep it as an attribute that does nothing."""
    for key in _strays(cls, kwargs):
        if key in _option_names():
            raise ValueError(f"{key}: got {kwargs[key]!r} as a config field; write norm_kwargs={{{key!r}: ...}}")
        raise ValueError(f"{key}: no such config field; norm fields are {', '.join(NORM_FIELDS)}")


def _names_ramped(given: Mapping[str, Any]) -> bool:
    """Whether norm fields name an option that training can ramp, at the top or for a site."""
    entries = (norm for _, _, norm in _overrides(given.get("norm_overrides")))
    kwargs = [given.get("norm_kwargs"), *(entry.get("kwargs") for entry in entries if isinstance(entry, Mapping))]
    return any(ramped_options() & options.keys() for options in kwargs if isinstance(options, Mapping))


def _overrides(given: Any) -> Iterator[tuple[str, str, Any]]:
    """What errors call an override, its glob and its norm, for each item of `norm_overrides`.

    Raises:
        ValueError: an item is no pair of a glob and a norm.
    """
    for item in given.items() if isinstance(given, Mapping) else given or ():
        if not isinstance(item, (list, tuple)) or len(item) != 2 or not isinstance(item[0], str):
            raise ValueError(f"norm_overrides: got {item!r}, must be [glob, norm name or {{'type', 'kwargs'}}]")
        yield f"norm_overrides[{item[0]!r}]", item[0], item[1]


def resolve_norm(
    field: str, name: Any, kwargs_field: str, kwargs: Any, eps: float | None
) -> tuple[str, dict[str, Any]]:
    """A norm's name and all its options; `STOCK` has none. Where the model has no `eps`, it is None, unless given.

    A norm whose eps is None takes that of the norm that it replaces.
    """
    if name == STOCK:
        if kwargs:
            raise ValueError(f"{kwargs_field}: got {kwargs!r} for the norm {STOCK!r}, which has no options")
        return STOCK, {}
    name = norm_name(name, field)
    options = resolve_norm_kwargs(name, kwargs, eps, kwargs_field)
    if eps is None and "eps" in options and NORMS[name].contract.takes_model_eps and (kwargs or {}).get("eps") is None:
        options["eps"] = None
    return name, options


class NormConfigMixin:
    """Resolves and checks the norm fields. A family's config adds its `model_type` and the three fields."""

    model_type: ClassVar[str]
    stock_model_type: ClassVar[str]
    norm_eps_field: ClassVar[str]
    norm_pin: ClassVar[Pin | None]
    norm_type_is_taken: ClassVar[bool]
    norm_type: str
    norm_kwargs: dict | None
    norm_overrides: list | dict | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock: Any = cls.__mro__[cls.__mro__.index(NormConfigMixin) + 1]
        cls.stock_model_type = stock.model_type
        cls.norm_type_is_taken = "norm_type" in getattr(stock, "__dataclass_fields__", ())
        cls.norm_eps_field = next((field for field in EPS_FIELDS if hasattr(cls, field)), "")
        cls.norm_pin = PINS.get(cls.stock_model_type)

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_strays(type(self), kwargs)
        kwargs.pop("model_type", None)  # as an attribute it would hide the class's
        kwargs.setdefault("auto_map", {})  # trl reads it of every model that is not Transformers' own
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.resolve_norms()

    def validate_norms(self) -> None:
        """Part of Transformers' validation, which runs at init, at `.validate()` and before saving."""
        self._resolved()

    def resolve_norms(self) -> None:
        """Bring `norm_type`, `norm_kwargs` and `norm_overrides` to their resolved form.

        Raises:
            ValueError, TypeError: naming the field, the value and what is allowed.
        """
        self.norm_type, self.norm_kwargs, self.norm_overrides = self._resolved()

    def norm_at(self, site: str, kind: str = STREAM) -> tuple[str, dict[str, Any]]:
        """Name and options of the norm at a site: of the last override that matches, else of `norm_type`.

        Args:
            site: its name, relative to the base model.
            kind: sites of other kinds than "stream" keep the stock norm, unless an override matches.
        """
        for glob, norm in reversed(self.norm_overrides or []):
            if fnmatchcase(site, glob):
                return norm["type"], norm["kwargs"]
        return (self.norm_type, self.norm_kwargs or {}) if kind == STREAM else (STOCK, {})

    def _resolved(self) -> tuple[str, dict[str, Any], list]:
        eps = self.model_eps
        name, kwargs = resolve_norm("norm_type", self.norm_type, "norm_kwargs", self.norm_kwargs, eps)
        if self.norm_type_is_taken:
            raise ValueError(f"norm_type: {self.stock_model_type} has a field of this name; its norms cannot be chosen")
        resolved = []
        for field, glob, norm in _overrides(self.norm_overrides):
            if self.norm_pin is not None:  # without a pin, globs are checked when the norms are put in
                self.norm_pin.check_glob(f"{field}:", glob, self)  # type: ignore[arg-type]
            norm = {"type": norm} if isinstance(norm, str) else norm
            if not isinstance(norm, Mapping) or not {"type"} <= set(norm) <= {"type", "kwargs"}:
                raise ValueError(f"{field}: got {norm!r}, must be a norm name or {{'type': ..., 'kwargs': {{...}}}}")
            own_name, own = resolve_norm(f"{field}.type", norm["type"], f"{field}.kwargs", norm.get("kwargs"), eps)
            resolved.append([glob, {"type": own_name, "kwargs": own}])
        return name, kwargs, resolved

    @property
    def model_eps(self) -> float | None:
        """ε of the norms of a pinned architecture; None for others, whose norms say theirs when they are replaced."""
        return getattr(self, self.norm_eps_field, None) if self.norm_pin is not None else None

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        # Here too, for then Transformers does not warn of the stock checkpoint's model type.
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return cls._with_norm(config_dict, kwargs), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        config_dict = cls._with_norm(config_dict, kwargs)
        _refuse_strays(cls, kwargs)
        # Keys like ours that a file happens to have ("bias", "order") are its own affair.
        strays = {key: config_dict.pop(key) for key in [*_strays(cls, config_dict), _OTHER_NORMS] if key in config_dict}
        if not cls.__module__.startswith("transformers_modules."):
            config_dict.pop("auto_map", None)  # the code stays behind when this package saves the model
        loaded = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        config: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        vars(config).update(strays)
        return loaded

    @classmethod
    def _with_norm(cls, config_dict: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A copy of a checkpoint's config with the norm fields moved into it from the arguments of loading.

        Transformers would set those arguments on the finished config, whose norms are resolved by then, and would let
        a stock checkpoint silently take the default norm.
        """
        given = {key: kwargs.pop(key) for key in NORM_FIELDS if key in kwargs}
        ramped_given = _names_ramped(given)
        unnamed = cls.model_type if "norm_type" in config_dict else cls.stock_model_type
        source, eps = config_dict.get("model_type") or unnamed, cls.norm_eps_field
        if source not in (cls.model_type, cls.stock_model_type):
            raise ValueError(f"model_type: got a {source!r} checkpoint, {cls.__name__} takes {cls.stock_model_type!r}")
        if source == cls.stock_model_type:
            if "norm_type" not in given:
                raise ValueError(
                    f"norm_type: this checkpoint is a stock {source!r} model; say which norm it gets, e.g. "
                    f"from_pretrained(..., norm_type={DEFAULT_NORM!r}); known are {', '.join(NORMS)}"
                )
            given["model_type"] = cls.model_type
            if eps in kwargs:
                given[eps] = kwargs.pop(eps)
        elif eps in kwargs and "norm_type" not in given and "norm_kwargs" not in given:
            raise ValueError(f"{eps}: the norms of this checkpoint have an eps each; pass norm_kwargs={{'eps': ...}}")
        kept = dict(config_dict)
        options = kept.pop("norm_kwargs", None)
        if "norm_type" in given:
            name = given["norm_type"] if given["norm_type"] == STOCK else norm_name(given["norm_type"])
            options = options if name == kept.get("norm_type") else None  # the other norm's
        if isinstance(given.get("norm_kwargs"), Mapping):
            given["norm_kwargs"] = {**(options or {}), **given["norm_kwargs"]}
        if given:
            given[_OTHER_NORMS] = {key: config_dict.get(key) for key in NORM_FIELDS} | {"ramped": ramped_given}
        return {**kept, "norm_kwargs": options, **given}

    def to_dict(self) -> dict[str, Any]:
        self._name_to_peft()
        fields = super().to_dict()  # type: ignore[misc]
        fields.pop(_OTHER_NORMS, None)
        if not fields.get("auto_map"):
            fields.pop("auto_map", None)
        return fields

    @property
    def norms_were_given(self) -> bool:
        """Whether this config was loaded with norm fields as arguments, so that its checkpoint may have other norms."""
        return bool(getattr(self, _OTHER_NORMS, None))

    def norms_on_file(self) -> Any:
        """A copy with the norms of the checkpoint's config.json; None for a stock checkpoint."""
        fields = getattr(self, _OTHER_NORMS, None) or {}
        if fields and fields["norm_type"] is None:
            return None
        config: Any = copy.deepcopy(self)
        vars(config).update({name: value for name, value in fields.items() if name in NORM_FIELDS})
        config.resolve_norms()
        return config

    @property
    def ramped_was_given(self) -> bool:
        """Whether the arguments that this config was loaded with named an option that training can ramp."""
        return bool((getattr(self, _OTHER_NORMS, None) or {}).get("ramped"))

    def forget_given(self) -> None:
        """Forget the arguments of loading, once the model has been loaded."""
        vars(self).pop(_OTHER_NORMS, None)

    def _name_to_peft(self) -> None:
        """Give this model type the adapter targets PEFT has for the stock one.

        PEFT chooses default `target_modules` by model type, from tables that have no registration; it asks for
        `to_dict()` just before. Only entries of our own are added.
        """
        constants = sys.modules.get("peft.utils.constants")
        for table in vars(constants).values() if constants else ():
            if isinstance(table, dict) and self.stock_model_type in table:
                table.setdefault(self.model_type, table[self.stock_model_type])  # type: ignore[attr-defined]


@strict
class IBNormLlamaConfig(NormConfigMixin, LlamaConfig):
    """LlamaConfig plus the norm of every site.

    Args:
        norm_type: a name of `hf_ibnorm.NORMS` (default `ibnorm_l`).
        norm_kwargs: its options, e.g. `{"lam": 4.0}`; those left out take their defaults, `eps` takes `rms_norm_eps`
            (layernormalnorm keeps its own 1e-5).
        norm_overrides: a list of `[glob, norm]` for sites that differ: `glob` (fnmatch) over names relative to the base
            model, such as `"layers.0.*"` or `"norm"`; `norm` a name or `{"type": name, "kwargs": {...}}`. The last
            match wins; nothing is inherited from `norm_kwargs`. A dict is taken too, and kept as a list.
        **kwargs: every field of LlamaConfig.

    `from_pretrained` of a stock checkpoint needs an explicit `norm_type`. Given `norm_kwargs` change single options of
    the checkpoint's norm; with another `norm_type`, options that are not given take their defaults.

    Raises:
        ValueError, TypeError: unknown norm or option (with the nearest name), a value that is not allowed, or a glob
            that matches no site.
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type, or was set to a bad value later and is
            validated or saved.
    """

    model_type = "ibnorm_llama"

    norm_type: str = DEFAULT_NORM
    norm_kwargs: dict | None = None
    norm_overrides: list | dict | None = None


@strict
class IBNormGPT2Config(NormConfigMixin, GPT2Config):
    """GPT2Config plus the norm of every site; as `IBNormLlamaConfig`, with `layer_norm_epsilon` as the model's eps.

    Sites are `h.N.ln_1`, `h.N.ln_2`, with `add_cross_attention` `h.N.ln_cross_attn`, and `ln_f`.
    """

    model_type = "ibnorm_gpt2"

    norm_type: str = DEFAULT_NORM
    norm_kwargs: dict | None = None
    norm_overrides: list | dict | None = None


def config_for(name: str, stock: type[PreTrainedConfig], model_type: str, module: str) -> type[PreTrainedConfig]:
    """A config's class with norms, for any architecture of Transformers; as `IBNormLlamaConfig` is for Llama.

    Args:
        name: of the class.
        stock: the stock config's class.
        model_type: of the configs.
        module: where the class is found by its name, when it is unpickled.
    """
    fields = {"norm_type": str, "norm_kwargs": dict | None, "norm_overrides": list | dict | None}
    body = {
        "__doc__": f"{stock.__name__} plus the norm of every site; as `IBNormLlamaConfig` is to LlamaConfig.",
        "__module__": module,
        "__annotations__": fields,
        "model_type": model_type,
        "norm_type": DEFAULT_NORM,
        "norm_kwargs": None,
        "norm_overrides": None,
    }
    return strict(type(name, (NormConfigMixin, stock), body))


__all__ = ["IBNormGPT2Config", "IBNormLlamaConfig"]
