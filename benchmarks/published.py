"""Normality normalization as one writes it down from the paper: plain eager PyTorch, differentiated by autograd.

A peer for the benchmarks, not part of the library. It follows arXiv 2505.00685 step by step, with masks for the signs
and powers for the transform, and keeps the division away from 0 as the published implementation does, by adding
±sqrt(eps) to the exponents; `tests/test_benchmarks.py` checks it against that implementation's numbers.
"""

import math

import torch
from torch import Tensor, nn


def published_normal_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, noise: float = 0.0, eps: float = 1e-5
) -> Tensor:
    """LayerNormalNorm of the last dimension: y of the shape of `x`."""
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, unbiased=False, keepdim=True)
    h = (x - mean) / torch.sqrt(variance + eps)
    sign = torch.where(h < 0, -1.0, 1.0)
    base = 1 + torch.abs(h)
    log = torch.log(base)
    d = base * log - torch.abs(h)
    dvar = 2 * (h * d).mean(-1, keepdim=True)
    d2 = sign * (base * log**2 - 2 * d)
    first = dvar / 2 - (sign * log).mean(-1, keepdim=True)
    second = -(dvar**2) / 2 + (h * d2 + (d - d.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    lam = 1 - first / (second + math.sqrt(eps))
    eta = 1 + sign * (lam - 1)
    eta = eta + torch.where(eta < 0, -1.0, 1.0) * math.sqrt(eps)
    p = sign * (base**eta - 1) / eta
    if noise:
        scale = torch.abs(p - p.mean(-1, keepdim=True)).mean(-1, keepdim=True).detach()
        p = p + noise * scale * torch.randn_like(p)
    y = p if weight is None else p * weight
    return y if bias is None else y + bias


class PublishedNormalNorm(nn.Module):
    """The same as a module with `weight` and `bias`; noise in training, as in `hf_ibnorm.LayerNormalNorm`."""

    def __init__(self, width: int, noise: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return published_normal_norm(x, self.weight, self.bias, self.noise if self.training else 0.0)
