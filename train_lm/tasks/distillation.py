"""Distillation (arXiv 1503.02531): a student learns from a teacher's probabilities of every token, beside the text."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import IGNORE
from ..settings import TrainConfig

_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A model whose logits are distilled; it draws no random numbers.

    Args:
        model: in float32 and eval mode, without gradients, whole on each process.
        config: the run's, which says how.
    """

    model: PreTrainedModel
    config: TrainConfig

    def loss(self, student: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimized, and the divergence in it without weight and factor: sums over the targets that count."""
        logits = student(input_ids=inputs, use_cache=False).logits
        weight, temperature = self.config.distillation_weight, self.config.distillation_temperature
        return distillation_loss(logits, self.logits(inputs), targets, weight, temperature)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """The teacher's, in the arithmetic that the student has."""
        low = _LOW.get(self.config.mixed_precision)
        with torch.autocast(inputs.device.type, low, enabled=low is not None):
            found: Tensor = self.model(input_ids=inputs, use_cache=False).logits
        return found


def distillation_loss(
    logits: Tensor, taught: Tensor, targets: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """(1 - weight) · cross-entropy + weight · T² · KL(teacher ‖ student), and that KL, in nats.

    KL is taken between both distributions at temperature T; T² keeps its gradient as large whatever T is.

    Args:
        logits: the student's, (batch, length, vocabulary).
        taught: the teacher's, of the same shape, without gradients.
        targets: ids of the next tokens, (batch, length); those that are `IGNORE` count in neither term.
        weight: in [0, 1].
        temperature: T > 0.

    Returns:
        Two scalars in float32, sums over the targets that count; the second without gradients.
    """
    logits, targets = logits.float().flatten(0, 1), targets.flatten()
    text = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    # Each tensor of tokens times vocabulary counts: the teacher's logits are let go of, and there is no product to sum.
    taught = F.log_softmax(taught.float().flatten(0, 1) / temperature, -1)
    difference = taught - F.log_softmax(logits / temperature, -1)
    divergence = torch.linalg.vecdot(taught.exp_(), difference)
    divergence = divergence.masked_fill(targets == IGNORE, 0.0).sum()
    return (1 - weight) * text + weight * temperature**2 * divergence, divergence.detach()
