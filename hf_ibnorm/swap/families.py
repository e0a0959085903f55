"""The classes with our norms, for every config and model of Transformers, and the tables by which it finds them.

`IBNormX` stands in for `X`. Those of Llama and GPT-2 have files of their own, which can travel with a checkpoint; all
others are made when they are first asked for.
"""

import sys
import threading
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..base.lazy import after_import

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PACKAGE = "hf_ibnorm"
PREFIX = "IBNorm"
MODEL_TYPE_PREFIX = "ibnorm_"
_MAKING = threading.RLock()
WITH_FILES = ("llama", "gpt2")
"""Stock model types whose classes have files of their own."""


def stand_in(stock: Any) -> Any:
    """The class with our norms for a config or a model of Transformers, made on first use.

    Args:
        stock: the class, or its name; a model that Transformers does not export must have been imported.

    Raises:
        AttributeError: Transformers has no such config or model.
    """
    with _MAKING:  # two threads would make two classes
        if isinstance(stock, str):
            stock = _stock_class(stock)
        name, package = f"{PREFIX}{stock.__name__}", sys.modules[PACKAGE]
        if name not in vars(package):
            setattr(package, name, _explicit(name) or _made(name, stock))
        return vars(package)[name]


def _stock_class(name: str) -> Any:
    import transformers
    from transformers import PreTrainedConfig, PreTrainedModel

    modules = [module for key, module in list(sys.modules.items()) if key.startswith("transformers.models.")]
    stock = getattr(transformers, name, None) or next((vars(m)[name] for m in modules if name in vars(m)), None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedConfig | PreTrainedModel)):
        raise AttributeError(f"module {PACKAGE!r} has no attribute {PREFIX + name!r}")
    return stock


def named_class(name: str) -> Any:
    """The class that `architectures` of a config names: one of Transformers, or of ours.

    Raises:
        AttributeError: there is none.
    """
    return stand_in(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else _stock_class(name)


def _explicit(name: str) -> Any:
    """A class that has its place in a file; None for others."""
    files = ["configuration_ibnorm", *(f"modeling_ibnorm_{model_type}" for model_type in WITH_FILES)]
    return next((vars(module)[name] for module in map(_import, files) if name in vars(module)), None)


def _import(module: str) -> ModuleType:
    return import_module(f"{PACKAGE}.{module}")


def _made(name: str, stock: Any) -> Any:
    from transformers import PreTrainedConfig

    if issubclass(stock, PreTrainedConfig):
        return _import("configuration_ibnorm").config_for(
            name, stock, f"{MODEL_TYPE_PREFIX}{stock.model_type}", PACKAGE
        )
    return _import("modeling_ibnorm").model_for(name, stock, stand_in(stock.config_class), PACKAGE)


@dataclass(frozen=True)
class Family:
    """One architecture of Transformers, by its stock model type."""

    stock_model_type: str

    @property
    def model_type(self) -> str:
        """The `model_type` in configs of ours."""
        return f"{MODEL_TYPE_PREFIX}{self.stock_model_type}"

    @cached_property
    def config(self) -> Any:
        """The class of its configs with our norms."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        return stand_in(CONFIG_MAPPING_NAMES[self.stock_model_type])

    @property
    def pin(self) -> Any:
        """Where the norms of the stock model must be, and which they must be; None where that is read off the model."""
        return _import("sites").PINS.get(self.stock_model_type)

    @property
    def stock_norm(self) -> str:
        """What a config of ours has as `norm_type` where the norms are those of the stock model."""
        return _import("configuration_ibnorm").STOCK if self.pin is None else self.pin.stock

    @property
    def stream_norm(self) -> str | None:
        """The norm in the residual stream of the stock model, by its name in the registry; None where that is unknown.

        A model with norms of several kinds there has no such name either.
        """
        if self.pin is not None:
            return self.pin.stock
        import torch
        from transformers import AutoConfig, AutoModel

        sites = _import("sites")
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(self.stock_model_type))
        computed = {site.computes for site in sites.discover(model) if site.kind == sites.STREAM}
        return computed.pop() if len(computed) == 1 else None

    @property
    def auto_classes(self) -> dict[str, type["PreTrainedModel"]]:
        """Name of each of Transformers' Auto classes that knows the stock model → our class."""
        from transformers.models.auto import modeling_auto

        classes = {}
        for name, auto in vars(modeling_auto).items():
            table = getattr(auto, "_model_mapping", None) if name.startswith("Auto") else None
            stock = None if table is None else table._model_mapping.get(self.stock_model_type)
            if isinstance(stock, str):
                classes[name] = stand_in(stock)
        return classes

    @property
    def stock_classes(self) -> dict[type["PreTrainedModel"], type["PreTrainedModel"]]:
        """Stock class → ours, of the models that Auto classes know."""
        return {cls.stock: cls for cls in self.auto_classes.values()}  # type: ignore[attr-defined]

    @property
    def causal_lm(self) -> type["PreTrainedModel"]:
        """Its language model with our norms.

        Raises:
            KeyError: it has none.
        """
        return self.auto_classes["AutoModelForCausalLM"]

    @property
    def tokenizer_name(self) -> str | None:
        """The tokenizer's class that Transformers has for the stock model type; None for the general one."""
        from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

        return TOKENIZER_MAPPING_NAMES.get(self.stock_model_type)


FAMILIES = tuple(map(Family, WITH_FILES))


def family_of(config: "PreTrainedConfig") -> Family:
    """The architecture of a config, stock or ours."""
    return Family(getattr(type(config), "stock_model_type", type(config).model_type))


def register() -> None:
    """Make our model types known wherever Transformers goes by model type or class name, as soon as it is imported.

    Its tables hold names of classes, and for each model type a module that is asked for a class when it is needed. For
    our types that module is this package, whose names are on demand. `AutoModel.register` wants the classes themselves,
    and reaches only some of what reads those names.
    """
    auto, processors = (
        "transformers.models.auto",
        ("image_processing", "feature_extraction", "video_processing", "processing"),
    )
    tables = {"modeling_auto": _register_classes, "tokenization_auto": _register_classes}
    after_import(auto, {"configuration_auto": _register_configs, **tables})
    after_import(auto, {f"{module}_auto": _register_classes for module in processors}, all_at_once=False)


def _register_configs(auto: ModuleType) -> None:
    table = auto.CONFIG_MAPPING
    titles = getattr(auto, "MODEL_NAMES_MAPPING", {})  # in older releases, for docstrings
    for stock, name in list(auto.CONFIG_MAPPING_NAMES.items()):
        if not stock.startswith(MODEL_TYPE_PREFIX):
            ours = f"{MODEL_TYPE_PREFIX}{stock}"
            titles[ours] = table._mapping[ours] = f"{PREFIX}{name}"
            table._modules[auto.model_type_to_module_name(ours)] = sys.modules[PACKAGE]
            # The class of a checkpoint that carries its code, loaded before this package was: it would come first.
            table._extra_content.pop(ours, None)


def _register_classes(auto: ModuleType) -> None:
    """Let a module's tables, from model types to classes, hold our models, or the processors of the stock ones."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    prefix = PREFIX if auto.__name__.endswith(".modeling_auto") else ""
    for table in vars(auto).values():
        if not hasattr(table, "_model_mapping") or not hasattr(table, "_reverse_config_mapping"):
            continue
        for stock, names in list(table._model_mapping.items()):
            if stock.startswith(MODEL_TYPE_PREFIX) or stock not in CONFIG_MAPPING_NAMES:
                continue
            ours = f"{MODEL_TYPE_PREFIX}{stock}"
            table._model_mapping[ours] = _ours(names, prefix)
            table._reverse_config_mapping.setdefault(f"{PREFIX}{CONFIG_MAPPING_NAMES[stock]}", ours)
            table._modules[model_type_to_module_name(ours)] = sys.modules[PACKAGE]


def _ours(names: Any, prefix: str) -> Any:
    """Names of our classes in the shape that a table has for the stock ones: a name, several, or None among them."""
    if isinstance(names, str):
        return prefix + names
    if isinstance(names, tuple | list):
        return type(names)(_ours(name, prefix) for name in names)
    if isinstance(names, dict):
        return {key: _ours(name, prefix) for key, name in names.items()}
    return names
