"""Memory and speed of `hf-ibnorm convert` on a sharded checkpoint, beside plain copies of the same files.

python benchmarks/convert.py [--gigabytes 2] [--shard 500] [--repeats 5] [--output FILE.csv]

A Llama of random weights is written shard by shard into a temporary folder. Then every round runs each kind in a fresh
process, in an order of its own: the conversions, whose peak memory is counted above what their imports take, and two
copies, one of them flushed to the disk, as the target of a conversion is. Ratios are medians of the rounds' own ratios.
The exit status is 1 where a conversion takes more memory than 1.2 times the largest shard and 200 MB.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results_file import write_rows
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

INITS = ("keep", "identity")
COPIES = ("copy", "copy, flushed")
SIZES = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "vocab_size": 32000}
SMALL = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 2, "vocab_size": 256}
"""For checkpoints below 100 MB."""
# Not getrusage's ru_maxrss: a process starts with that of the one that started it.
CONVERT = """
import json, sys, time
from pathlib import Path
from hf_ibnorm import convert_checkpoint
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before, began = peak(), time.perf_counter()
convert_checkpoint(sys.argv[1], sys.argv[2], "ibnorm_l", init=sys.argv[3])
print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak() - before}))
"""
COPY = """
import json, os, shutil, sys, time
from pathlib import Path
began = time.perf_counter()
shutil.copytree(sys.argv[1], sys.argv[2])
for path in Path(sys.argv[2]).iterdir() if sys.argv[3].endswith("flushed") else ():
    with path.open("rb") as file:
        os.fsync(file.fileno())
print(json.dumps({"seconds": time.perf_counter() - began}))
"""


def write_checkpoint(folder: Path, size: float, shard_size: float) -> None:
    """A Llama of random bfloat16 weights and about `size` bytes, in shards of at most `shard_size`."""
    sizes = SIZES if size >= 1e8 else SMALL
    with torch.device("meta"):
        one, two = (LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers)) for layers in (1, 2))
    first, layer = one.num_parameters(), two.num_parameters() - one.num_parameters()
    config = LlamaConfig(**sizes, num_hidden_layers=max(1, round((size / 2 - first) / layer) + 1), dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled + 2 * shape.numel() > shard_size and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * shape.numel()
    places = {}
    for i, names in enumerate(shards, 1):
        part = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({name: torch.randn(shapes[name]).bfloat16() for name in names}, folder / part, {"format": "pt"})
        places |= dict.fromkeys(names, part)
        with (folder / part).open("rb") as file:
            os.fsync(file.fileno())  # or it would be written to the disk while something is timed
    index = {"metadata": {"total_size": 2 * sum(shape.numel() for shape in shapes.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def once(kind: str, source: Path, target: Path) -> dict[str, float]:
    """Seconds of a fresh process after its imports, and for a conversion its peak memory above them."""
    words = ["-c", COPY if kind in COPIES else CONVERT, str(source), str(target), kind]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    shutil.rmtree(target, ignore_errors=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def conversions(gigabytes: float, shard_megabytes: float, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for every kind, the copies first."""
    with tempfile.TemporaryDirectory(prefix="hf_ibnorm_convert_") as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        write_checkpoint(source, gigabytes * 1e9, shard_megabytes * 1e6)
        sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
        bound = 1.2 * max(sizes) + 200e6
        once(COPIES[1], source, target)  # so that no round alone reads from the disk
        kinds, generator = (*COPIES, *INITS), random.Random(0)
        rounds = [
            {kind: once(kind, source, target) for kind in generator.sample(kinds, len(kinds))} for _ in range(repeats)
        ]
        for kind in kinds:
            seconds = statistics.median(each[kind]["seconds"] for each in rounds)
            ratios = [each[kind]["seconds"] / each[COPIES[1]]["seconds"] for each in rounds]
            peaks = [each[kind]["peak"] for each in rounds if kind in INITS]
            yield {
                "kind": kind,
                "gigabytes": f"{sum(sizes) / 1e9:.3g}",
                "shards": len(sizes),
                "largest_shard_mb": f"{max(sizes) / 1e6:.3g}",
                "peak_mb": f"{max(peaks) / 1e6:.0f}" if peaks else "",
                "bound_mb": f"{bound / 1e6:.0f}" if peaks else "",
                "seconds": f"{seconds:.2f}",
                "gigabytes_per_second": f"{sum(sizes) / 1e9 / seconds:.2f}",
                "ratio_to_flushed_copy": f"{statistics.median(ratios):.2f}",
                "ratio_least": f"{min(ratios):.2f}",
                "ratio_most": f"{max(ratios):.2f}",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--shard", type=float, default=500.0, help="megabytes a shard, at most (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV file to write (default: none)")
    arguments = parser.parse_args()
    rows = list(conversions(arguments.gigabytes, arguments.shard, arguments.repeats))
    write_rows(rows, ("torch", "transformers", "safetensors", "hf_ibnorm"), arguments.repeats, arguments.output, "cpu")
    if over := [row["kind"] for row in rows if row["peak_mb"] and float(row["peak_mb"]) > float(row["bound_mb"])]:
        raise SystemExit(f"more memory than 1.2 times the largest shard and 200 MB: {', '.join(over)}")


if __name__ == "__main__":
    main()
