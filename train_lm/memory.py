"""How much of a device's memory a training step takes, counted by running the step on tensors without values."""

import warnings
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from hf_ibnorm.base.room import check_model
from hf_ibnorm.sites import blocks_of, context_of
from hf_ibnorm.swap.families import family_of

from .architecture import build_model_config, names_in
from .flops import GroupedShapes, attention_of, flops_per_token
from .model import new_model, read_config, speed_up, starting_config
from .optim import freeze
from .settings import TrainConfig
from .tasks.language import LOW, training_loss


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one process holds at the worst moment of a step, and numbers of parameters of the model."""

    weights: int  # in float32, as all that follows; with buffers
    gradients: int
    optimizer: int  # AdamW's two numbers a trained parameter
    # Tensors kept for the backward pass, logits, weights that autocast has cast, temporaries; or the memory of a
    # validation batch, if that is more; and a teacher's weights.
    activations: int
    parameters: int  # from here on numbers of parameters
    trained: int
    block: int  # in one block, the largest
    outside: int  # in no block: embeddings, output layer, last norm
    flops_per_token: float  # a teacher's included

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations


def step_memory(config: TrainConfig, gradients_stay: bool = False) -> StepMemory:
    """Run a step of the real model on tensors without values, and count the most bytes that are alive at a time.

    The operators are those of a CPU, whose attention keeps no scores, as on a GPU. `compile`, which may save memory, is
    left out.

    `config` is a validated run, as `spread_over` returns it; with `gradients_stay` gradients have memory of their own
    all the time, as in DDP's buckets. ValueError or TypeError where the model cannot be built, or has adapters.
    """
    if config.trainable == "lora":
        raise ValueError("trainable: got 'lora', which cannot be planned (peft needs values); all and norms can")
    low = LOW.get(config.mixed_precision)
    with warnings.catch_warnings(), FakeTensorMode(), GroupedShapes(), _Live() as live:
        warnings.simplefilter("ignore")
        model = _model(config)
        freeze(model, config)
        speed_up(model, replace(config, compile=False))
        taught, teacher = 0, None
        if config.teacher is not None:
            teacher = _built("teacher", read_config("teacher", config.teacher)).eval().requires_grad_(False)
            taught = sum(tensor.nbytes for tensor in [*teacher.parameters(), *teacher.buffers()])
        flops = flops_per_token(model, config.block_size, teacher)
        if flops is None:
            raise ValueError(
                f"model: got a {type(model).__name__}, which cannot be planned: its steps depend on values"
            )
        # As Accelerate wraps a model.
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", low, enabled=low is not None)(model.forward))
        base = live.peak = live.now
        with torch.no_grad():
            _pass(model, None, config, config.per_device_eval_batch_size)
        validation = live.peak - base
        gradients = sum(tensor.nbytes for tensor in model.parameters() if tensor.requires_grad)
        if gradients_stay or config.gradient_accumulation_steps > 1:
            for tensor in model.parameters():
                tensor.grad = torch.zeros_like(tensor) if tensor.requires_grad else None
        live.peak = live.now
        _pass(model, teacher, config, config.per_device_train_batch_size)
        training = live.peak - base
        activations = max(training - gradients, validation - (0 if gradients_stay else gradients))
        count = sum(tensor.numel() for tensor in model.parameters())
        in_blocks = [sum(tensor.numel() for tensor in block.parameters()) for block in blocks_of(model)[1]]
        return StepMemory(
            weights=4 * count + sum(tensor.nbytes for tensor in model.buffers()),
            gradients=gradients,
            optimizer=2 * gradients,
            activations=activations + taught,
            parameters=count,
            trained=gradients // 4,
            block=max(in_blocks),
            outside=count - sum(in_blocks),
            flops_per_token=flops,
        )


def _pass(model: PreTrainedModel, teacher: PreTrainedModel | None, config: TrainConfig, sequences: int) -> None:
    """The forward pass of a batch of so many sequences and, where there are gradients, the backward pass."""
    inputs, targets = torch.zeros((2, sequences, config.block_size), dtype=torch.int64)
    loss, _ = training_loss(model, teacher, config, inputs, targets)
    if torch.is_grad_enabled():
        loss.backward()


def _model(config: TrainConfig) -> PreTrainedModel:
    """The model of a run in training mode, with its initial weights."""
    if config.model.init_from is None:
        built: Any = build_model_config(config)
    else:
        built = starting_config(config, config.model.init_from, None)[1]
        config.check_context(context_of(built))
    check_model("model", built, weights=False)
    for name in names_in(built, "dropout"):
        if "att" in name:  # with dropout, a CPU's fused attention keeps the scores; a GPU's does not
            setattr(built, name, 0.0)
    return _built("model", built).train()


def _built(field: str, config: Any) -> PreTrainedModel:
    return new_model(field, config, attn_implementation=attention_of(family_of(config).causal_lm))


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive; views of one storage count once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
