"""Speed and memory of the fused norms beside their peers, interleaved in one process.

python benchmarks/fused.py norms   # forward, backward, both; widths 512 to 4096
python benchmarks/fused.py steps   # whole training steps of two Llamas

Each takes [--repeats N] [--output FILE.csv] [--device cpu|cuda]. Times are medians; every round runs every candidate,
in an order of its own, so that what else the machine does meets all of them, and before each timed norm the same
untimed, so that none finds the caches and the heap as another left them. Ratios are medians of the rounds' own ratios.
"""

import argparse
import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from published import PublishedNormalNorm, published_normal_norm
from results_file import write_rows
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_ibnorm import apply_norm, norm_sites
from hf_ibnorm.base.command import quiet_libraries
from hf_ibnorm.functional import ib_norm as plain_ib_norm
from hf_ibnorm.kernels import ib_norm, lacking, normal_norm

SHAPES = ((2048, 512), (4096, 1024), (2048, 2048), (1024, 4096))
BASE, COPY = "torch layer_norm", "copy of x"
PACKAGES = ("torch", "transformers", "triton", "hf_ibnorm")
LLAMAS = {
    "demo": (16, 256, {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384}, 4),
    "llama-60m": (2, 256, {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376}, 8),
}
"""Batch, context, sizes, and how many layers and heads."""
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def candidates(width: int, device: str) -> dict[str, Norm]:
    """Every norm that is timed, as a function of x, weight and bias. Those called "ours" are this project's kernels."""
    row, lam = (width,), torch.tensor(4.0, device=device)
    stock = LlamaRMSNorm(width).to(device)

    def llama_rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(stock, {"weight": weight}, (x,))

    def ours(variant: str) -> Norm:
        return lambda x, weight, bias: ib_norm(x, weight, bias, variant=variant, lam=lam, backend="fused")

    def ours_normal(noise: float) -> Norm:
        return lambda x, weight, bias: normal_norm(x, weight, bias, noise=noise, training=noise > 0, backend="fused")

    plain: dict[str, Norm] = {
        BASE: lambda x, weight, bias: F.layer_norm(x, row, weight, bias, 1e-6),
        "torch rms_norm": lambda x, weight, bias: F.rms_norm(x, row, weight, 1e-6),
        "LlamaRMSNorm": llama_rms_norm,
        "IBNorm-L, formulas": lambda x, weight, bias: plain_ib_norm(x, weight, bias, variant="L", lam=lam),
        "NormalNorm, published form": published_normal_norm,
        "NormalNorm with noise, published form": lambda x, weight, bias: published_normal_norm(x, weight, bias, 1.0),
    }
    compiled = {f"{name}, torch.compile": torch.compile(norm, dynamic=False) for name, norm in plain.items()}
    fused = {f"IBNorm-{variant}, ours": ours(variant) for variant in "SLT"}
    fused |= {"NormalNorm, ours": ours_normal(0.0), "NormalNorm with noise, ours": ours_normal(1.0)}
    plain[COPY] = lambda x, weight, bias: x.clone()
    return {**plain, **compiled, **fused, **(gpu_peers(width, device) if device == "cuda" else {})}


def gpu_peers(width: int, device: str) -> dict[str, Norm]:
    """Other projects' kernels, where they are installed."""
    peers: dict[str, Norm] = {}
    try:
        from liger_kernel.ops.dyt import LigerDyTFunction
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        alpha = torch.full((1,), 0.5, device=device)
        peers["RMSNorm, Liger"] = lambda x, weight, bias: LigerRMSNormFunction.apply(
            x, weight, 1e-6, 0.0, "llama", False
        )
        peers["LayerNorm, Liger"] = lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-6)
        peers["DyT, Liger"] = lambda x, weight, bias: LigerDyTFunction.apply(x, alpha, weight, bias)
    except ImportError as error:
        print(f"without Liger-Kernel: {error}")
    try:
        from quack import rmsnorm

        peers["RMSNorm, quack"] = lambda x, weight, bias: rmsnorm(x, weight)
    except ImportError as error:
        print(f"without quack: {error}")
    return peers


def seconds(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds that `work` takes, and its result."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, result
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def in_turns(names: Iterable[str], repeats: int) -> Iterator[str]:
    """Every name once a round, in another order each."""
    order, generator = list(names), random.Random(0)
    for _ in range(repeats):
        generator.shuffle(order)
        yield from order


def once(norm: Norm, tensors: tuple[Tensor, ...], grad: Tensor, device: str) -> dict[str, float]:
    """Seconds of one forward and one backward."""
    forward, y = seconds(lambda: norm(*tensors), device)
    used = [each for each in tensors if each.requires_grad]
    backward, _ = seconds(lambda: torch.autograd.grad(y, used, grad, allow_unused=True), device)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def peak_extra(work: Callable[[], Any], device: str) -> float:
    """Megabytes in use at most while `work` runs, beyond those before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but not given back would hide what is taken again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    work()
    return (resident("VmHWM") - before) / 1e6


def resident(field: str) -> int:
    """Bytes that /proc/self/status tells for `field`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024


def moved(direction: str, rows: int, width: int, size: int) -> int:
    """Bytes that must move at least: x in and y out; x and the gradient in, that of x out."""
    tensors = {"forward": 2, "backward": 3, "both": 5}[direction]
    return tensors * rows * width * size


def norms(repeats: int, device: str) -> Iterator[dict[str, Any]]:
    """A row for every candidate, shape and direction."""
    for dtype in (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float32):
        for rows, width in SHAPES:
            torch._dynamo.reset()
            generator = torch.Generator(device).manual_seed(0)
            x, grad = (torch.randn(rows, width, device=device, generator=generator).to(dtype) for _ in range(2))
            weight, bias = (torch.rand(width, device=device, generator=generator).to(dtype) for _ in range(2))
            tensors = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
            found = candidates(width, device)
            for norm in found.values():  # compiles, and warms caches up
                for _ in range(3):
                    once(norm, tensors, grad, device)
            times: dict[str, list[dict[str, float]]] = {name: [] for name in found}
            for name in in_turns(found, repeats):
                once(found[name], tensors, grad, device)
                times[name].append(once(found[name], tensors, grad, device))
            for name, norm in found.items():
                extra = peak_extra(partial(once, norm, tensors, grad, device), device)
                for direction in ("forward",) if name == COPY else ("forward", "backward", "both"):
                    each = [one[direction] for one in times[name]]
                    ratios = [one / base[direction] for one, base in zip(each, times[BASE], strict=True)]
                    middle = statistics.median(each)
                    yield {
                        "norm": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "rows": rows,
                        "width": width,
                        "direction": direction,
                        "ms": f"{middle * 1e3:.3f}",
                        "ms_least": f"{min(each) * 1e3:.3f}",
                        "gigabytes_per_second": f"{moved(direction, rows, width, x.element_size()) / middle / 1e9:.1f}",
                        "ratio_to_layer_norm": f"{statistics.median(ratios):.2f}",
                        "peak_extra_mb": f"{extra:.1f}" if direction == "both" else "",
                    }


def llama(shape: str, norm: str, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A stock Llama with `norm` in place of its own, and its optimizer."""
    _, context, size, count = LLAMAS[shape]
    torch.manual_seed(0)
    size = {**size, "num_hidden_layers": count, "num_attention_heads": count, "max_position_embeddings": context}
    model = LlamaForCausalLM(LlamaConfig(**size))
    if norm.startswith("published"):
        for name in norm_sites(model):
            model.set_submodule(name, PublishedNormalNorm(size["hidden_size"]))
    elif norm != "stock RMSNorm":
        name, _, kind = norm.partition(", ")
        apply_norm(model, name, **({"backend": "reference"} if kind == "formulas" else {}))
    model.to(device).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def steps(repeats: int, device: str) -> Iterator[dict[str, Any]]:
    """A row for every Llama and norm: seconds of forward, loss, backward, clipping and AdamW."""
    kinds = ["stock RMSNorm", "layernorm", "rmsnorm", "ibnorm_s", "ibnorm_l", "ibnorm_t", "layernormalnorm"]
    kinds += ["ibnorm_l, formulas", "published form of layernormalnorm"]
    for shape, (batch, context, size, _) in LLAMAS.items():
        ids = torch.randint(size["vocab_size"], (batch, context + 1), device=device)
        made = {kind: llama(shape, kind, device) for kind in kinds}

        def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor = ids) -> None:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        for one in made.values():
            step(*one)
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        rounds = repeats * (4 if shape == "demo" else 1)  # its steps are as much shorter
        for kind in in_turns(kinds, rounds):
            times[kind].append(seconds(partial(step, *made[kind]), device)[0])
        for kind, each in times.items():
            ratios = [one / base for one, base in zip(each, times["stock RMSNorm"], strict=True)]
            yield {
                "model": shape,
                "norm": kind,
                "dtype": "bfloat16 autocast" if device == "cuda" else "float32",
                "batch": batch,
                "context": context,
                "rounds": rounds,
                "seconds": f"{statistics.median(each):.4f}",
                "tokens_per_second": f"{batch * context / statistics.median(each):.0f}",
                "ratio_to_stock": f"{statistics.median(ratios):.3f}",
                "ratio_least": f"{min(ratios):.3f}",
                "ratio_most": f"{max(ratios):.3f}",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("norms", "steps"))
    parser.add_argument("--repeats", type=int, help="rounds (default: 20 for norms, 10 for steps)")
    parser.add_argument("--output", type=Path, help="CSV file to write (default: none)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    quiet_libraries()
    if reason := lacking(arguments.device):
        raise SystemExit(f"no fused kernels to time on {arguments.device}: {reason}")
    repeats = arguments.repeats or {"norms": 20, "steps": 10}[arguments.what]
    measure = {"norms": norms, "steps": steps}[arguments.what]
    write_rows(measure(repeats, arguments.device), PACKAGES, repeats, arguments.output, arguments.device)


if __name__ == "__main__":
    main()
