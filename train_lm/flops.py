"""Floating point operations of training, as torch counts them on tensors without values."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_ibnorm.analysis.places import evaluating

# Transformers' attention without a mask: by itself it leaves the mask out only where it can see that nothing is padded.
# Tensors without values do not show that, and a mask of length times length would be counted.
ATTENTION = "sdpa_without_mask"
AttentionInterface.register(ATTENTION, sdpa_attention_forward)


class GroupedShapes(TorchDispatchMode):
    """The shapes of experts' matrix products for tensors without values, which torch itself knows for bfloat16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        first, second, ends = args[:3]
        experts = (len(ends),) if first.ndim == second.ndim == 2 else ()  # the gradient of the experts' weights
        return first.new_empty(*experts, first.shape[0], second.shape[-1])


def _grouped(first: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Operations of the experts' matrix products, each over the tokens that were sent to it, and of their gradients."""
    return 2 * first.numel() * out_shape[-1]


def flops_per_token(model: PreTrainedModel, block_size: int, teacher: PreTrainedModel | None = None) -> float | None:
    """Floating point operations that training on one token takes, forward and backward, and forward for a teacher.

    Those of matrix products, convolutions and attention over all of `block_size` tokens, the mask not subtracted, as in
    PaLM (arXiv 2204.02311, appendix B); of experts, those that a token is sent to. Activations that are computed a
    second time do not count.

    Args:
        model: on the meta device, or of fake tensors, as the teacher.
        block_size: tokens of a sequence.
        teacher: a model that is run beside it.

    Returns:
        Their number; None where a model cannot be run without values.
    """
    try:
        own = _count(model, block_size)
        return (own if teacher is None else own + _count(teacher, block_size)) / block_size
    except RuntimeError:  # something in it depends on values
        return None


def _count(model: PreTrainedModel, block_size: int) -> int:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped})
    # Transformers reads values of meta tensors, and knows that fake ones have none.
    fake = FakeTensorMode(allow_non_fake_inputs=True) if detect_fake_mode() is None else nullcontext()
    # Fused attention counts what it computes a second time, too.
    unfused, gradients = sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(bool(trained))
    with fake, evaluating(model), _without_mask(model), unfused, gradients, GroupedShapes(), counter:
        tokens = torch.zeros((1, block_size), dtype=torch.int64, device=model.device)
        logits = model(input_ids=tokens, use_cache=False).logits
        if trained:
            torch.autograd.grad(logits, trained, torch.zeros_like(logits), allow_unused=True)
    return counter.get_total_flops()


def attention_of(model: type[PreTrainedModel]) -> str:
    """The attention with which a step of a model is counted: without a mask, where the model allows torch's own."""
    return ATTENTION if model._supports_sdpa else "eager"


@contextmanager
def _without_mask(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(attention_of(type(model)))
    try:
        yield
    finally:
        model.set_attn_implementation(before)
