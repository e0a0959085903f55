"""A norm as a user writes one: an odd parameter, an odd option that is ramped, a buffer, a diagnostic of its own."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from hf_ibnorm import Measure, NormBase, register_norm


class Tempered(NormBase):
    """RMSNorm with a temper, a shift that is learned after gain and bias, and an offset that is not."""

    ramp = "temper"
    ramp_start = 1.0
    measures = (Measure("loud", "loud elements", "this test"),)

    def __init__(
        self,
        normalized_shape,
        temper=1.5,
        hush=0.0,
        eps=1e-6,
        elementwise_affine=True,
        bias=True,
        device=None,
        dtype=None,
    ):
        super().__init__(normalized_shape, elementwise_affine=elementwise_affine, bias=bias, device=device, dtype=dtype)
        self.hush, self.eps = float(hush), float(eps)
        self.hold(temper, device)
        self.kappa = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.register_buffer("offset", torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        init.constant_(self.kappa, 0.25)
        init.constant_(self.offset, 0.125)

    def measured(self, rows):
        z = self.core(rows)
        return z, {"loud": (z.abs() > 2).float().mean(-1)}

    def forward(self, x):
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.temper * (1 - self.hush) + self.offset
        y = y if self.weight is None else y * self.weight
        y = y if self.bias is None else y + self.bias
        return (y + self.kappa).to(x.dtype)


register_norm("tempered", Tempered)
