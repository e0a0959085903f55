"""What libraries around a model are told of ours, once they are imported, where they go by model type or by origin.

Transformers is told in `families`. `tests/hf_ibnorm/test_ecosystem.py` has every place that is known.
"""

import functools
import sys
from types import ModuleType
from typing import Any

from ..base.lazy import after_import
from .families import MODEL_TYPE_PREFIX


def register() -> None:
    """Tell PEFT, Accelerate and TRL, now where they are imported already, or else as soon as they are."""
    after_import("peft.tuners.adaption_prompt", {"config": _register_prompts})
    after_import("accelerate.utils", {"dataclasses": _refuse_megatron})
    after_import("trl.trainer", {"utils": _explain_origin})


def _register_prompts(config: ModuleType) -> None:
    """PEFT's other tables are filled by our configs, which a checkpoint's own code has, too."""
    table = config.TRANSFORMERS_MODEL_CONFIG
    table[f"{MODEL_TYPE_PREFIX}llama"] = table["llama"]  # GPT-2's attention is told from others by "gpt2" itself


def _refuse_megatron(dataclasses: ModuleType) -> None:
    """Accelerate takes `ibnorm_llama` for a Llama because it contains that name, and lets Megatron-LM build one."""

    def refuse(plugin: Any, model: Any, batch_data: Any) -> None:
        raise ValueError(
            f"distributed_type: got MEGATRON_LM for a {type(model).__name__}; Megatron-LM builds layers of its own, "
            "with the stock norms; use FSDP or DeepSpeed"
        )

    parsers = dataclasses.MODEL_CONFIGS_TO_MEGATRON_PARSERS
    others = {name: parser for name, parser in parsers.items() if name != MODEL_TYPE_PREFIX}
    parsers.clear()
    parsers.update({MODEL_TYPE_PREFIX: refuse, **others})  # the first that a model type contains is taken


def _explain_origin(utils: ModuleType) -> None:
    """TRL loads a reference model from where the model came from: nowhere, for one with other norms than there."""
    load = getattr(utils, "create_model_from_path", None)
    if load is None or hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def load_unless_from_nowhere(model_id: str, *args: Any, **kwargs: Any) -> Any:
        if not model_id:
            raise ValueError(
                "model: it was loaded from no directory that has its norms, so TRL cannot load its reference model; "
                'before making the trainer: model.save_pretrained("DIRECTORY"); '
                'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")'
            )
        return load(model_id, *args, **kwargs)

    for name, module in list(sys.modules.items()):  # those that have the function from here already, too
        if module is utils or (name.startswith("trl.") and vars(module).get(load.__name__) is load):
            setattr(module, load.__name__, load_unless_from_nowhere)
