"""How a run is spread over processes, as the launcher was told: one process, DDP, FSDP2 or DeepSpeed's ZeRO; all of it
Accelerate's.

The rest of the program sees whole tensors: sharded tensors are put together here, one by one, and cut up again. So the
files of a checkpoint do not depend on how its run was spread, and a run spread in another way can go on from it.
DeepSpeed is imported in functions: most runs never need it.
"""

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    convert_outputs_to_fp32,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import unset_hf_deepspeed_config

from hf_ibnorm.base.command import require_extra
from hf_ibnorm.base.errors import UserError

from .settings import TrainConfig, allow

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # gradients that DeepSpeed reduces at a time: its own 500 million take 2 GB beside the model
PERSISTENT = 100_000  # ZeRO-3 leaves parameters of fewer elements whole, norms above all; DeepSpeed's own default


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate as the loop needs it; UserError where the launcher or the settings ask for more than is done here."""
    cuda, timeout = torch.cuda.is_available(), timedelta(seconds=config.ddp_timeout)
    check_precision(config.mixed_precision)
    allow("launcher: parallelism_config", _launched("USE_PARALLELISM_CONFIG", "false"), ["false"])
    in_recipe = "; set compile in the recipe"
    allow("launcher: dynamo_backend", _launched("DYNAMO_BACKEND", "no"), ["no"], instead=in_recipe)
    plugin = sharding(config.mixed_precision)
    if plugin is not None:
        allow("trainable", config.trainable, ["all", "norms"], " with FSDP")
    deepspeed = deepspeed_plugin(config) if _launched("USE_DEEPSPEED", "false") == "true" else None
    if deepspeed is not None and not cuda:
        meet_on_cpu(timeout)
    if config.deterministic and cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # No code here reads memory before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    accelerator = Accelerator(
        # Without it two processes without a GPU would not find each other and train two models into one directory.
        cpu=not cuda and deepspeed is None,
        # The loop sums over micro-batches itself; a launcher's setting would divide the loss a second time.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        mixed_precision=config.mixed_precision if deepspeed is None else "no",  # DeepSpeed has its own
        fsdp_plugin=plugin,
        deepspeed_plugin=deepspeed,
        kwargs_handlers=[
            # Gradients live in the buckets that are reduced, not beside them.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # One machine may tokenize, or read a checkpoint, for longer than another before they meet.
            InitProcessGroupKwargs(timeout=timeout),
        ],
        log_with=config.log_with or None,
        project_dir=config.run_dir,
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # On a CPU Accelerate drops its plugin without a word, but its code for the plugin works there as well.
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
    if deepspeed is not None:
        unset_hf_deepspeed_config()  # under ZeRO-3 Transformers would give every model it makes empty parameters
    kinds = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}
    kinds |= {DistributedType.FSDP, DistributedType.DEEPSPEED}
    if (kind := accelerator.distributed_type) not in kinds:
        raise UserError(f"launcher: got {kind.value}, allowed are one process, or several with DDP, FSDP2 or DeepSpeed")
    return accelerator


def _launched(name: str, default: str) -> str:
    """A setting of the launcher, from the environment."""
    return os.environ.get(f"ACCELERATE_{name}", default).lower()


def check_precision(wanted: str) -> None:
    """Raise UserError for a precision that this machine lacks, or that the launcher contradicts."""
    if wanted == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision: got 'fp16', which needs a GPU; allowed here are no, bf16")
    launched = _launched("MIXED_PRECISION", "no")
    if launched not in ("no", wanted):
        raise UserError(f"mixed_precision: got {wanted!r}, but the launcher was given {launched!r}; set both alike")


def sharding(precision: str) -> FullyShardedDataParallelPlugin | None:
    """FSDP as the launcher's config file describes it; None where the file does not ask for it."""
    if _launched("USE_FSDP", "false") != "true":
        return None
    plugin = FullyShardedDataParallelPlugin()  # reads the launcher's settings from the environment
    for setting, value, allowed in (
        ("fsdp_version", plugin.fsdp_version, [2]),
        ("fsdp_cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, [False]),
        ("fsdp_activation_checkpointing", plugin.activation_checkpointing, [False]),
        ("fsdp_offload_params", isinstance(plugin.cpu_offload, CPUOffloadPolicy), [False]),
        ("mixed_precision", precision, ["no", "bf16"]),
    ):
        instead = "; set gradient_checkpointing in the recipe" if "activation" in setting else ""
        allow(f"launcher: {setting}", value, allowed, " with FSDP", instead)
    # Everything in float32, and autocast as elsewhere (`Spread`). Told of bfloat16, FSDP2 would gather weights and keep
    # hidden states in it: another arithmetic than that of the other ways, in which a gain near 1 hardly moves.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return plugin


def deepspeed_plugin(config: TrainConfig) -> DeepSpeedPlugin:
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


class Spread:
    """A model as Accelerate has prepared it, and the parts of a step that each way of spreading makes differently."""

    kind: str  # `one`, `ddp`, `fsdp2`, `zero2` or `zero3`

    def __init__(self, model: Any, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model, accelerator
        if accelerator.distributed_type == DistributedType.FSDP:
            self.kind = "fsdp2"
            if accelerator.mixed_precision == "bf16":  # in every other way of spreading Accelerate does this
                autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
                model.forward = convert_outputs_to_fp32(autocast(model.forward))
        else:
            self.kind = "ddp" if accelerator.num_processes > 1 else "one"

    @property
    def sharded(self) -> bool:
        """Whether a process holds only a part of each parameter."""
        return self.kind in ("fsdp2", "zero3")

    def part_of_step(self, last: bool) -> AbstractContextManager[None]:
        """Around the passes of a micro-batch: gradients are summed over processes with the `last` one.

        Sharded gradients are summed with each: put off, they would lie in memory whole.
        """
        return nullcontext() if last or self.kind != "ddp" else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, factor: float, last: bool) -> None:
        """Add the gradients of `factor` times `loss`, averaged over processes."""
        self.accelerator.backward(loss * factor)

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients to `max_norm`, 0 for not at all; returns their norm before."""
        return whole(self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm or math.inf))

    def optimizer_tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Tensor]:
        """Copies of the optimizer's state on the CPU, named kind/parameter; none unless `keep`. All must call this."""
        copies = {
            f"{kind}/{name}": on_host(value, keep)
            for name, parameter in model.named_parameters()
            for kind, value in optimizer.state.get(parameter, {}).items()
        }
        return {name: value for name, value in copies.items() if value is not None}

    def restore_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
    ) -> None:
        """Give the optimizer the state that `optimizer_tensors` took, of a model spread in this way or another."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for i, parameter in enumerate(trained):
            saved = {kind: tensors.get(f"{kind}/{names[id(parameter)]}") for kind in ("step", *MOMENTS)}
            held = {kind: value for kind, value in saved.items() if value is not None}
            # The step, a scalar, is whole on every process.
            state[i] = {kind: laid_out(value, parameter) if value.ndim else value for kind, value in held.items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Zero(Spread):
    """The same with DeepSpeed's ZeRO-2 or ZeRO-3, whose engine the model is.

    The engine keeps AdamW's state in flat parts that belong to no parameter, and under ZeRO-3 leaves parameters empty
    between uses. This class uses names that DeepSpeed does not document; the tests ran with 0.19.8.
    """

    def __init__(self, model: Any, accelerator: Accelerator) -> None:
        self.model, self.accelerator, zero = model, accelerator, model.optimizer
        self.stage = model.zero_optimization_stage()
        self.kind = f"zero{self.stage}"
        self.adamw = zero.optimizer
        # AdamW's tensors: this process's part of each group of parameters, flat. Their state is zeros from the start:
        # otherwise ZeRO-2 links parameters to their moments when the first group has some, and later groups never.
        self.flat = list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)
        for part in self.flat:
            moments = {kind: torch.zeros_like(part) for kind in MOMENTS}
            self.adamw.state[part] = {"step": torch.zeros((), device=part.device), **moments}
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor, factor: float, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        # The engine looks at gradients only. The factor makes them NaN where the loss is not finite, and the engine
        # skips the step on all processes.
        self.model.backward(loss * (factor + 0 * loss.detach()))

    def clip(self, max_norm: float) -> Tensor:
        # The engine clips, steps and clears gradients in one call. The norm is infinite where it skipped the step.
        self.model.step()
        return torch.as_tensor(self.model.get_global_grad_norm(), dtype=torch.float32, device=self.model.device)

    def optimizer_tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        steps = self.adamw.state[self.flat[0]]["step"]
        for name, parameter in self.model.module.named_parameters():
            moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
            values = {"step": steps, **moments} if keep else {}
            tensors |= {f"{kind}/{name}": value.to("cpu", copy=True) for kind, value in values.items()}
        return tensors

    def restore_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
    ) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        steps = next((value for name, value in tensors.items() if name.startswith("step/")), None)
        if steps is None:
            return  # taken before the first step
        for part in self.flat:
            self.adamw.state[part]["step"].fill_(steps.item())
        for name, parameter in self.model.module.named_parameters():
            for kind in MOMENTS:
                value = tensors[f"{kind}/{name}"].to(self.model.device)
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value, kind)
                    continue
                # The call for whole values fails where a parameter does not divide by the number of processes.
                own = my_part(value, parameter)
                padded = F.pad(own, (0, parameter.ds_tensor.numel() - len(own)))
                safe_set_local_optimizer_state(parameter, padded, kind)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded over processes. Every process must call this, for the same tensors."""
    if _is_part(tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor)
    held: Any = tensor.detach()
    return held.full_tensor() if isinstance(held, DTensor) else held


def _is_part(tensor: Tensor) -> bool:
    """Whether `tensor` is a parameter that ZeRO-3 holds in parts."""
    return hasattr(tensor, "ds_id")


def on_host(tensor: Tensor, keep: bool) -> Tensor | None:
    """A copy of all of `tensor` in main memory where `keep` is true, else None. Every process must call this."""
    tensor = whole(tensor)
    return tensor.to("cpu", copy=True) if keep else None


def mine(tensor: Any) -> Tensor:
    """The part of `tensor` that this process holds; flat, without padding, under ZeRO-3."""
    if _is_part(tensor):
        from deepspeed.utils import safe_get_local_fp32_param

        start = torch.distributed.get_rank() * tensor.ds_tensor.numel()
        return safe_get_local_fp32_param(tensor).flatten()[: max(0, tensor.ds_numel - start)]
    held: Any = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def my_part(value: Tensor, like: Any) -> Tensor:
    """The part of `value`, which every process has whole, that this process holds of the parameter `like`."""
    if _is_part(like):
        size = like.ds_tensor.numel()
        return value.to(like.device).flatten()[torch.distributed.get_rank() * size :][:size]
    return mine(laid_out(value.to(like.device), like))


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 has left gathered after a forward pass without a backward pass.

    They are copies of the last unit's parameters, which the optimizer does not know, and a checkpoint would hold them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which every process has whole, held as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
