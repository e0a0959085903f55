"""How fast a run is: model FLOPs utilization and memory."""

import re
import resource
import sys

import torch
from torch import nn
from transformers import PreTrainedModel

PEAK_FLOPS = {
    # Words of the device's name: (bf16 and fp16 on tensor cores, dense; float32 without), by NVIDIA's data sheets.
    "B200": (2.25e15, 80e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A40": (149.7e12, 37.4e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


def peak_flops(device: str, mixed_precision: str) -> float | None:
    """FLOP/s that one device can do at most; None where it is not in the table."""
    for name, (low, full) in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device):
            return full if mixed_precision == "no" else low
    return None


def flops_per_token(model: PreTrainedModel, block_size: int) -> float:
    """Floating point operations that training on one token takes, forward and backward.

    6 for each weight of a matrix product, and 12·L·d·T for attention over T tokens in L blocks of width d, the mask not
    subtracted, as in PaLM (arXiv 2204.02311, appendix B). Embeddings are looked up, not multiplied with; the output
    layer counts even where it is tied to them.
    """
    config = model.config
    output = model.get_output_embeddings()
    lookups = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    matrices = {id(p): p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in lookups}
    matrices[id(output.weight)] = output.weight.numel()
    return 6.0 * sum(matrices.values()) + 12.0 * config.num_hidden_layers * config.hidden_size * block_size


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far, in GB: of this process's GPU, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak / 1e6
