"""How fast devices are, and how much memory they have and a run takes."""

import re
import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """A GPU, by its data sheet."""

    low: float  # FLOP/s in bf16 and fp16 on tensor cores, dense
    full: float  # FLOP/s in float32 without them
    memory: float  # GB
    bandwidth: float  # GB/s of its memory
    link: float  # GB/s to another GPU of the same machine, one way, over NVLink or else PCIe
    bfloat16: bool = True  # whether its tensor cores compute in it

    def flops(self, mixed_precision: str) -> float:
        """The most FLOP/s."""
        return self.full if mixed_precision == "no" else self.low


DEVICES = {
    # Words of the device's name; the first entry whose words fit counts.
    "B200": Device(2.25e15, 80e12, 180, 7700, 900),
    "H200": Device(989e12, 67e12, 141, 4800, 450),
    "H100 PCIe": Device(756e12, 51e12, 80, 2000, 64),
    "H100 NVL": Device(835e12, 60e12, 94, 3900, 64),
    "H100": Device(989e12, 67e12, 80, 3350, 450),
    "A100-40GB": Device(312e12, 19.5e12, 40, 1555, 300),
    "A100": Device(312e12, 19.5e12, 80, 2039, 300),
    "A40": Device(149.7e12, 37.4e12, 48, 696, 32),
    "L40S": Device(362e12, 91.6e12, 48, 864, 32),
    "L4": Device(121e12, 30.3e12, 24, 300, 32),
    "V100": Device(125e12, 15.7e12, 32, 900, 150, bfloat16=False),
    "T4": Device(65e12, 8.1e12, 16, 320, 16, bfloat16=False),
    "RTX 4090": Device(165.2e12, 82.6e12, 24, 1008, 32),
    "RTX 3090": Device(71e12, 35.6e12, 24, 936, 32),
}


def peak_flops(device: str, mixed_precision: str) -> float | None:
    """The most FLOP/s that one device can do; None where the device is not in the table."""
    for name, known in DEVICES.items():
        if re.search(rf"\b{name}\b", device):
            return known.flops(mixed_precision)
    return None


def peak_memory_gb(device: "torch.device") -> float:
    """Most memory used so far, in GB: of this process's GPU, or resident in main memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak / 1e6
