"""DeepSpeed's ZeRO-2 and ZeRO-3, where the launcher asks for them: what its engine does in another way than torch does.

The engine clips, steps and clears gradients in one call, keeps AdamW's state in flat parts that belong to no parameter,
and under ZeRO-3 leaves parameters empty between uses. Names that it does not document are used here; the tests ran with
0.19.8. It is imported in functions, since nothing else needs it.
"""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor

from hf_ibnorm.base.command import require_extra
from hf_ibnorm.base.errors import UserError

from .settings import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # gradients that are reduced at a time: DeepSpeed's own 500 million take 2 GB beside the model
PERSISTENT = 100_000  # ZeRO-3 leaves parameters of fewer elements whole, norms above all; DeepSpeed's own default


def launched() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def plugin(config: TrainConfig) -> DeepSpeedPlugin:
    """DeepSpeed as the launcher's config file and the recipe describe it."""
    if config.trainable != "all":
        raise UserError(f"trainable: got {config.trainable}, allowed with DeepSpeed: all")
    if config.teacher is not None:
        raise UserError(f"teacher: got {config.teacher!r}, allowed with DeepSpeed: null")
    require_extra("deepspeed", "deepspeed")
    for variable, setting in (
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "deepspeed_config_file"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "offload_param_device"),
    ):
        if (value := os.environ.get(variable, "none")) != "none":
            raise UserError(f"launcher: {setting}: got {value}, allowed: none")
    if config.mixed_precision == "fp16":
        raise UserError("launcher: mixed_precision: got fp16, allowed with DeepSpeed: no, bf16")
    made = DeepSpeedPlugin(zero3_init_flag=False)  # reads what the launcher put into the environment
    if made.zero_stage not in (2, 3):
        raise UserError(f"launcher: zero_stage: got {made.zero_stage}, allowed: 2, 3")
    if config.compile and made.zero_stage == 3:
        raise UserError("compile: got true, allowed with DeepSpeed's ZeRO-3: false; its hooks break blocks into pieces")
    settings = made.deepspeed_config
    settings |= {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 1,  # the loop sums over micro-batches itself
        "gradient_clipping": config.max_grad_norm,
    }
    settings["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": PERSISTENT}
    if config.mixed_precision == "bf16":
        # Autocast over float32 weights, as elsewhere; of no modules are gradients summed in bfloat16. DeepSpeed's own
        # `bf16` would make the weights that, gains included.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return made


def meet_on_cpu(timeout: timedelta) -> None:
    """Let processes without a GPU find each other; told of a CPU, Accelerate would leave DeepSpeed out."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference, and compiled when first looked for
    PartialState(cpu=True, timeout=timeout)


def stage(engine: Any) -> int:
    """2 or 3."""
    return int(engine.zero_optimization_stage())


def begin(engine: Any) -> None:
    """Give AdamW its state before the first step: zeros. Once, as soon as there is an engine.

    DeepSpeed's ZeRO-2 links parameters to their moments when the first group has some, and the groups after it never.
    """
    zero = engine.optimizer
    for flat in _flat_parts(engine):
        moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
    if stage(engine) < 3:
        zero._lazy_init_hp_params_optimizer_state()


def _flat_parts(engine: Any) -> list[Tensor]:
    """The tensors AdamW works on: this process's part of each group of parameters, flat."""
    name = "fp32_partitioned_groups_flat" if stage(engine) == 3 else "single_partition_of_fp32_groups"
    return list(getattr(engine.optimizer, name))


def backward(engine: Any, loss: Tensor, factor: float, last: bool) -> None:
    """Add the gradients of `factor` times `loss`; with the `last` ones the step is complete.

    The engine looks at gradients only: a loss that is not finite makes them so, and it skips the step on all processes.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss * (factor + 0 * loss.detach()))


def step(engine: Any) -> Tensor:
    """Clip, step and clear gradients; returns the norm they had, infinite where the step was skipped."""
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=engine.device)


def is_part(tensor: Tensor) -> bool:
    """Whether `tensor` is a parameter that ZeRO-3 holds in parts."""
    return hasattr(tensor, "ds_id")


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter. Every process must call this."""
    from deepspeed.utils import safe_get_full_fp32_param

    value: Tensor = safe_get_full_fp32_param(parameter)
    return value


def own(parameter: Any) -> Tensor:
    """The part of a parameter that this process holds, flat, without the padding."""
    from deepspeed.utils import safe_get_local_fp32_param

    return own_part(safe_get_local_fp32_param(parameter), parameter, first=0)


def own_part(value: Tensor, parameter: Any, first: int | None = None) -> Tensor:
    """The part of a parameter that this process holds, cut out of `value`, which begins at `first` of the parameter."""
    size, process = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    start = process * size if first is None else first
    return value.flatten()[start : start + max(0, min(size, parameter.ds_numel - process * size))]


def optimizer_tensors(engine: Any, keep: bool) -> dict[str, Tensor]:
    """The state of AdamW, named as `Spread.optimizer_tensors` names it. Every process must call this."""
    from deepspeed.utils import safe_get_full_optimizer_state

    tensors: dict[str, Tensor] = {}
    steps = engine.optimizer.optimizer.state[_flat_parts(engine)[0]]["step"]
    for name, parameter in engine.module.named_parameters():
        values = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
        if keep:
            tensors |= {
                f"{kind}/{name}": value.to("cpu", copy=True) for kind, value in {"step": steps, **values}.items()
            }
    return tensors


def restore_optimizer(engine: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state that was taken, here or without DeepSpeed."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    steps = next((value for name, value in tensors.items() if name.startswith("step/")), None)
    if steps is None:
        return  # taken before the first step
    for flat in _flat_parts(engine):
        engine.optimizer.optimizer.state[flat]["step"].fill_(steps.item())
    for name, parameter in engine.module.named_parameters():
        for kind in MOMENTS:
            value = tensors[f"{kind}/{name}"].to(engine.device)
            if stage(engine) < 3:
                safe_set_full_optimizer_state(parameter, value, kind)
                continue
            # The call for whole values fails where a parameter does not divide by the number of processes.
            size = parameter.ds_tensor.numel()
            padding = size * torch.distributed.get_world_size() - value.numel()
            part = F.pad(value.flatten(), (0, padding)).narrow(0, size * torch.distributed.get_rank(), size)
            safe_set_local_optimizer_state(parameter, part, kind)
