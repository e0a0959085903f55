"""What training needs to do with a model that has these norms: decay groups, and λ as a schedule changes it."""

import warnings
from typing import Any

from torch import nn

from ..modeling_ibnorm import NormModelMixin, record_ramped
from ..norm_base import NormBase


def no_decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that take no weight decay: everything that is not a matrix.

    That is every gain, bias and scalar of a norm, whatever the norm and wherever it sits, and the biases of linear
    layers. HF Trainer's own list knows nn.LayerNorm and some name patterns only, and would decay custom norms at
    GPT-2's `ln_*` sites.

    Args:
        model: any module, before it is wrapped or sharded.

    Returns:
        Sorted names, as in `model.named_parameters()`.
    """
    return sorted(name for name, parameter in model.named_parameters() if parameter.ndim < 2)


def set_lam(model: nn.Module, value: float) -> None:
    """Set λ of every IBNorm in `model`, and in its config. State dicts and checkpoints hold it beside the weights.

    Given a part of a model, it sets λ there, and saving the model writes that into the config. What PEFT saves of an
    adapter does not hold λ: it is the base's. A compiled model does not recompile. With `learn_lam` the parameter
    `theta` is set; it goes on learning from there. Norms of your own whose ramped option is called `lam` are set, too.

    Args:
        model: any module with `IBNorm`s in it (arXiv 2510.25262), wrapped or not.
        value: λ, allowed by the variant of each of them: L, T >= 0; S >= 1; shrink in [0, 1).

    Raises:
        ValueError, TypeError: the model has no IBNorm, or `value` is not allowed for one; nothing is changed then.

    Warns:
        UserWarning: the model has adapters of PEFT, whose checkpoints do not hold the new λ.
    """
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, NormBase) and norm.ramp == "lam"}
    if not norms:
        raise ValueError(
            f"model: {type(model).__name__} has no IBNorm, so there is no lam to set"
            " (import hf_ibnorm before loading a checkpoint that carries its code)"
        )
    for name, norm in norms.items():
        try:
            norm.checked_ramped(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} ({norm.variant_shown}, {name or 'the model itself'})") from None
    for norm in norms.values():
        norm.set_ramped(value)
    saved = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "modules_to_save"]
    adapted = any(vars(module).get("peft_config") for module in model.modules())
    if adapted and not all(name.startswith(tuple(f"{each}." for each in saved)) for name in norms):
        warnings.warn(
            "lam: was set under adapters of PEFT, whose checkpoints do not hold it; save the base model too",
            UserWarning,
            stacklevel=2,
        )
    whole: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, NormModelMixin) and not module.is_part:
            whole.setdefault(id(module.config), module)  # type: ignore[attr-defined]
    for outermost in whole.values():
        record_ramped(outermost)
