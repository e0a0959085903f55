"""How a run is spread over processes, as the launcher was told: one process, DDP, or FSDP2; all of it Accelerate's.

The rest of the program sees whole tensors: what is sharded is put together here, tensor by tensor, and cut up again, so
that a checkpoint is the same files however the run that wrote it was spread, and can be gone on from in another way.
"""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_ibnorm.cli import UserError

from .config import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate as this loop needs it.

    Raises:
        UserError: the launcher was told to distribute the model in a way that this program does not know, or to compute
            in another precision.
    """
    check_precision(config.mixed_precision)
    plugin = sharding(config.mixed_precision)
    if config.deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was never written
    accelerator = Accelerator(
        # Without it two processes without a GPU would not find each other and train two models into one directory.
        cpu=not torch.cuda.is_available(),
        # The loop sums over micro-batches itself; a launcher's setting would divide the loss a second time.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        mixed_precision=config.mixed_precision,
        fsdp_plugin=plugin,
        # Gradients live in the buckets that are reduced, not beside them.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=config.log_with or None,
        project_dir=config.run_dir,
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # On a CPU Accelerate drops its plugin without a word, but what it does with one works there as well.
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
    check_launcher(accelerator)
    return accelerator


def check_launcher(accelerator: Accelerator) -> None:
    """Refuse what a launcher may have been told and this program does not do.

    Raises:
        UserError: another kind of distribution.
    """
    kinds = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP}
    if (kind := accelerator.distributed_type) not in kinds:
        raise UserError(f"launcher: got {kind.value}, allowed are one process, or several with DDP or FSDP2")


def check_precision(wanted: str) -> None:
    """Refuse a precision that would not be had, or that the launcher was told differently.

    Raises:
        UserError: fp16 without a GPU, or a launcher's own setting that differs.
    """
    if wanted == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision: got 'fp16', which needs a GPU; allowed here are no, bf16")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", wanted):
        raise UserError(f"mixed_precision: got {wanted!r}, but the launcher was given {launched!r}; set both alike")


def sharding(precision: str) -> FullyShardedDataParallelPlugin | None:
    """FSDP as the launcher's config file describes it; None where it asks for none.

    Raises:
        UserError: a setting that this program cannot go along with.
    """
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
    if precision == "bf16":
        # Blocks are gathered and computed in bfloat16; shards, sums of gradients and the optimizer stay in float32.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return plugin


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds only a part of each parameter."""
    return accelerator.distributed_type == DistributedType.FSDP


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part. Every process must call this, for the same tensors."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_host(tensor: Tensor, keep: bool) -> Tensor | None:
    """A copy of all of `tensor` in main memory where `keep` is true; the others only help to put it together."""
    tensor = whole(tensor.detach())
    return tensor.to("cpu", copy=True) if keep else None


def mine(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Give up what a forward pass without a backward one left gathered.

    Until then the parameters of the last unit are gathered copies, in the arithmetic's precision and unknown to the
    optimizer: a checkpoint would hold those.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which every process has whole, held as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
