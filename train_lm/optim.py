"""The trained part of a model, which is all of it, its norms, or its norms and peft's LoRA adapters (arXiv 2106.09685);
AdamW over that part; and the schedules of the learning rate and λ.

A model is saved with its adapters merged into the weights: it loads without peft. To go on with the adapters, a
checkpoint holds them and the weights under them as well (`apart`).
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_ibnorm.checks import check_choice
from hf_ibnorm.sites import blocks_of, is_norm
from hf_ibnorm.swap.optim import no_decay_parameter_names

from .settings import TrainConfig

_BASE = ".base_layer."
_ADAPTER = ".lora_"


def freeze(model: PreTrainedModel, config: TrainConfig) -> None:
    """Let only the norms be trained, unless the settings say all."""
    if config.trainable == "all":
        return
    model.requires_grad_(False)
    for module in model.modules():
        if is_norm(module):
            module.requires_grad_(True)
    if config.trainable == "norms" and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("trainable: got 'norms', but the norms of the model have no parameters")


def add_adapters(model: PreTrainedModel, config: TrainConfig) -> None:
    """Put LoRA adapters on linear layers of the blocks, in place, if the settings ask for them.

    They change nothing yet; their initial values depend on the seed only.
    """
    if config.trainable != "lora":
        return
    from peft import LoraConfig, inject_adapter_in_model

    _, blocks = blocks_of(model)
    layers = (name for name, module in blocks.named_modules() if isinstance(module, nn.Linear | Conv1D))
    known = sorted({name.rpartition(".")[2] for name in layers})
    targets = known if config.lora_targets is None else config.lora_targets
    for name in targets:
        check_choice("lora_targets", name, tuple(known))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    alpha: Any = config.lora_alpha  # peft's annotation knows integers only, its arithmetic all numbers
    settings = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(config.seed)
        warnings.simplefilter("ignore", UserWarning)  # about GPT-2's transposed matrices, which peft handles
        inject_adapter_in_model(settings, model)
    for parameter in trained:  # peft freezes all but its own
        parameter.requires_grad_(True)


def merged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of `model` by the names they have without adapters, which are merged in."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layer, base, own = name.rpartition(_BASE)
        if base:
            adapted: Any = model.get_submodule(layer)
            yield f"{layer}.{own}", tensor + adapted.get_delta_weight("default") if own == "weight" else tensor
        elif _ADAPTER not in name:
            yield name, tensor


def apart(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters, and the weights they are merged into: after a merge neither is known to the bit."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if _ADAPTER in name or name.endswith(f"{_BASE}weight")
    }


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, with weight decay on matrices only."""
    kept = set(no_decay_parameter_names(model))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in parameters.items() if name not in kept], "weight_decay": config.weight_decay},
        {"params": [p for name, p in parameters.items() if name in kept], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of `step` (from 1): linear warmup to the peak, then a cosine to `min_lr_rate` of it at the end."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    floor = config.min_lr_rate
    return config.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def lam_fraction(step: int, config: TrainConfig) -> float:
    """How far along its ramp λ is in `step`: 0 at the start, 1 at the end."""
    return 1.0 if config.lam_schedule == "constant" else min(1.0, step / config.lam_warmup_steps)
