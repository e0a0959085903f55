"""AdamW and the two schedules: learning rate and λ."""

import math

import torch
from torch import nn

from hf_ibnorm.swap.optim import no_decay_parameter_names

from .settings import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, with weight decay on matrices only."""
    kept = set(no_decay_parameter_names(model))
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
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
    """λ of `step` as a fraction of its final value."""
    return 1.0 if config.lam_schedule == "constant" else min(1.0, step / config.lam_warmup_steps)
