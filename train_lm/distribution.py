"""How a run is spread over processes, as the launcher was told: one process, DDP, FSDP2 or DeepSpeed's ZeRO; all of it
Accelerate's.

The rest of the program sees whole tensors: what is sharded is put together here, tensor by tensor, and cut up again, so
that a checkpoint is the same files however the run that wrote it was spread, and can be gone on from in another way.
"""

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
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

from hf_ibnorm.base.errors import UserError

from . import zero
from .settings import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate as this loop needs it."""
    check_precision(config.mixed_precision)
    check_launcher()
    plugin = sharding(config.mixed_precision)
    if plugin is not None and config.trainable == "lora":
        raise UserError("trainable: got lora, allowed with FSDP: all, norms")
    deepspeed = zero.plugin(config) if zero.launched() else None
    cpu, timeout = not torch.cuda.is_available(), timedelta(seconds=config.ddp_timeout)
    if deepspeed is not None and cpu:
        zero.meet_on_cpu(timeout)
    if config.deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nothing here reads what was never written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    accelerator = Accelerator(
        # Without it two processes without a GPU would not find each other and train two models into one directory.
        cpu=cpu and deepspeed is None,
        # The loop sums over micro-batches itself; a launcher's setting would divide the loss a second time.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        mixed_precision=config.mixed_precision if deepspeed is None else "no",  # then DeepSpeed sees to it
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
        # On a CPU Accelerate drops its plugin without a word, but what it does with one works there as well.
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


def check_launcher() -> None:
    """Refuse what a launcher may have been told and this program does not do."""
    for variable, setting, allowed in (
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config", "false"),
        ("ACCELERATE_DYNAMO_BACKEND", "dynamo_backend", "no"),
    ):
        if (value := os.environ.get(variable, allowed).lower()) != allowed:
            instead = "; set compile in the recipe" if "dynamo" in setting else ""
            raise UserError(f"launcher: {setting}: got {value}, allowed: {allowed}{instead}")


def check_precision(wanted: str) -> None:
    """Refuse a precision that would not be had, or that the launcher was told differently."""
    if wanted == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision: got 'fp16', which needs a GPU; allowed here are no, bf16")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", wanted):
        raise UserError(f"mixed_precision: got {wanted!r}, but the launcher was given {launched!r}; set both alike")


def sharding(precision: str) -> FullyShardedDataParallelPlugin | None:
    """FSDP as the launcher's config file describes it; None where it asks for none."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    plugin = FullyShardedDataParallelPlugin()  # reads what the launcher put into the environment
    for setting, value, allowed in (
        ("fsdp_version", plugin.fsdp_version, (2,)),
        ("fsdp_cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, (False,)),
        ("fsdp_activation_checkpointing", plugin.activation_checkpointing, (False,)),
        ("fsdp_offload_params", isinstance(plugin.cpu_offload, CPUOffloadPolicy), (False,)),
        ("mixed_precision", precision, ("no", "bf16")),
    ):
        if value not in allowed:
            instead = "; set gradient_checkpointing in the recipe" if "activation" in setting else ""
            raise UserError(
                f"launcher: {setting}: got {value}, allowed with FSDP: {', '.join(map(str, allowed))}{instead}"
            )
    # Everything in float32, and autocast like elsewhere (`Spread`). Told of bfloat16, FSDP2 would gather that and keep
    # hidden states in it: another arithmetic than the other ways of spreading, in which a gain near 1 hardly moves.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return plugin


class Spread:
    """A model as Accelerate has prepared it, and the parts of a step that each way of spreading makes differently."""

    kind: str  # `one`, `ddp`, `fsdp2`, `zero2` or `zero3`

    def __init__(self, model: Any, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model, accelerator
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.deepspeed:
            self.kind = f"zero{zero.stage(model)}"
            zero.begin(model)
        elif accelerator.distributed_type == DistributedType.FSDP:
            self.kind = "fsdp2"
            if accelerator.mixed_precision == "bf16":  # which Accelerate sees to in every other way of spreading
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

        Where they are sharded they are summed each time: put off, they would lie there whole.
        """
        return nullcontext() if last or self.kind != "ddp" else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, factor: float, last: bool) -> None:
        """Add the gradients of `factor` times `loss`, averaged over processes."""
        if self.deepspeed:
            zero.backward(self.model, loss, factor, last)
        else:
            self.accelerator.backward(loss * factor)

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients to `max_norm`, 0 for not at all; returns the norm that they had.

        DeepSpeed does not do so without making the step as well, or skipping it where they are not finite.
        """
        if self.deepspeed:
            return zero.step(self.model)
        return whole(self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm or math.inf))

    def optimizer_tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Tensor]:
        """Copies of the optimizer's state on the CPU, named kind/parameter; none unless `keep`. All must call this."""
        if self.deepspeed:
            return zero.optimizer_tensors(self.model, keep)
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
        if self.deepspeed:
            zero.restore_optimizer(self.model, tensors)
            return
        parameters = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in parameters.items()}
        ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        places = {name: i for i, name in enumerate(ordered)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if name in places and kind not in ("start", "apart"):
                held = laid_out(value, parameters[name]) if value.ndim else value  # every process counts all steps
                state.setdefault(places[name], {})[kind] = held
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part. Every process must call this, for the same tensors."""
    if zero.is_part(tensor):
        return zero.whole(tensor)
    held: Any = tensor.detach()
    return held.full_tensor() if isinstance(held, DTensor) else held


def on_host(tensor: Tensor, keep: bool) -> Tensor | None:
    """A copy of all of `tensor` in main memory where `keep` is true; the others only help to put it together."""
    tensor = whole(tensor)
    return tensor.to("cpu", copy=True) if keep else None


def mine(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this process holds."""
    if zero.is_part(tensor):
        return zero.own(tensor)
    held: Any = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def my_part(value: Tensor, like: Tensor) -> Tensor:
    """The part of `value`, which every process has whole, that this process holds of the parameter `like`."""
    if zero.is_part(like):
        return zero.own_part(value.to(like.device), like)
    return mine(laid_out(value.to(like.device), like))


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 has left gathered after a forward pass without a backward pass.

    They are copies of the last unit's, in the arithmetic's precision and unknown to the optimizer: a checkpoint would
    hold these copies.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which every process has whole, held as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
