"""DeepSpeed's ZeRO-2 and ZeRO-3, where the launcher asks for them: the parts of a step that differ from torch's own.

The engine clips, steps and clears gradients in one call, keeps AdamW's state in flat parts that belong to no parameter,
and under ZeRO-3 leaves parameters empty between uses. This file uses names that DeepSpeed does not document; the tests
ran with 0.19.8. DeepSpeed is imported in functions, since nothing else needs it.
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

from .settings import TrainConfig, allow

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # gradients that are reduced at a time: DeepSpeed's own 500 million take 2 GB beside the model
PERSISTENT = 100_000  # ZeRO-3 leaves parameters of fewer elements whole, norms above all; DeepSpeed's own default


def plugin(config: TrainConfig) -> DeepSpeedPlugin:
    """DeepSpeed as the launcher's config file and the recipe describe it."""
    allow("trainable", config.trainable, ["all"], " with DeepSpeed")
    if config.teacher is not None:
        raise UserError(f"teacher: got {config.teacher!r}, allowed with DeepSpeed: null")
    require_extra("deepspeed", "deepspeed")
    for variable, setting in (
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "deepspeed_config_file"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "offload_param_device"),
    ):
        allow(f"launcher: {setting}", os.environ.get(variable, "none"), ["none"])
    allow("launcher: mixed_precision", config.mixed_precision, ["no", "bf16"], " with DeepSpeed")
    made = DeepSpeedPlugin(zero3_init_flag=False)  # reads the launcher's settings from the environment
    allow("launcher: zero_stage", made.zero_stage, [2, 3])
    if config.compile and made.zero_stage == 3:
        raise UserError("compile: got true, allowed with DeepSpeed's ZeRO-3: false; its hooks break blocks into pieces")
    made.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 1,  # the loop sums over micro-batches itself
        "gradient_clipping": config.max_grad_norm,
    }
    sharded = {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": PERSISTENT}
    made.deepspeed_config["zero_optimization"] |= sharded
    if config.mixed_precision == "bf16":
        # Autocast over float32 weights, as elsewhere; no module's gradients are summed in bfloat16. DeepSpeed's `bf16`
        # would make the weights bfloat16, gains included.
        settings = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        made.deepspeed_config["torch_autocast"] = settings
    return made


def meet_on_cpu(timeout: timedelta) -> None:
    """Let processes without a GPU find each other; told of a CPU, Accelerate would leave DeepSpeed out."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference, and compiled when first looked for
    PartialState(cpu=True, timeout=timeout)


def begin(engine: Any) -> None:
    """Give AdamW its state, zeros, before the first step.

    Otherwise ZeRO-2 links parameters to their moments when the first group has some, and later groups never.
    """
    zero = engine.optimizer
    for flat in _flat_parts(engine):
        moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
    if engine.zero_optimization_stage() < 3:
        zero._lazy_init_hp_params_optimizer_state()


def _flat_parts(engine: Any) -> list[Tensor]:
    """The tensors of AdamW: this process's part of each group of parameters, flat."""
    zero, sharded = engine.optimizer, engine.zero_optimization_stage() == 3
    return list(zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups)


def backward(engine: Any, loss: Tensor, factor: float, last: bool) -> None:
    """Add the gradients of `factor` times `loss`; with the `last` ones the step is complete.

    The engine looks at gradients only. The factor makes them NaN where the loss is not finite, and the engine skips the
    step on all processes.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss * (factor + 0 * loss.detach()))


def step(engine: Any) -> Tensor:
    """Clip, step and clear gradients; returns their norm before, infinite where the step was skipped."""
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=engine.device)


def is_part(tensor: Tensor) -> bool:
    """Whether `tensor` is a parameter that ZeRO-3 holds in parts."""
    return hasattr(tensor, "ds_id")


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter. Every process must call this."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def own(parameter: Any) -> Tensor:
    """The part of a parameter that this process holds, flat, without the padding."""
    from deepspeed.utils import safe_get_local_fp32_param

    start = torch.distributed.get_rank() * parameter.ds_tensor.numel()
    return safe_get_local_fp32_param(parameter).flatten()[: max(0, parameter.ds_numel - start)]


def own_part(value: Tensor, parameter: Any) -> Tensor:
    """The part of `value`, of the shape of a parameter, that this process holds of the parameter, flat."""
    size = parameter.ds_tensor.numel()
    return value.flatten()[torch.distributed.get_rank() * size :][:size]


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
            if engine.zero_optimization_stage() < 3:
                safe_set_full_optimizer_state(parameter, value, kind)
                continue
            # The call for whole values fails where a parameter does not divide by the number of processes.
            part = own_part(value, parameter)
            safe_set_local_optimizer_state(parameter, F.pad(part, (0, parameter.ds_tensor.numel() - len(part))), kind)
