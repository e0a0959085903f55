"""Time and memory of `hf-ibnorm analyze` on a Llama of the demo's size, by the length of the text.

python benchmarks/analysis.py [--norm layernormalnorm] [--tokens 25000 50000 100000] [--output FILE.csv]

A model of random weights is written into a temporary folder; every analysis is a fresh process, whose peak memory is
counted above what its imports take. "statistics" leaves all else out, and shows what grows with the text. The exit
status is 1 where the longest text takes more than two minutes, or 30 MB more than the shortest: the outputs of one
norm, kept for the tokens between, would be 38 MB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results_file import write_rows

from hf_ibnorm import IBNormLlamaConfig, IBNormLlamaForCausalLM
from hf_ibnorm.data import load_corpus
from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
PARTS = {"everything": [], "statistics": ["normality", "noise", "information"]}
SECONDS, MEGABYTES = 120.0, 30.0
# Not getrusage's ru_maxrss: a process starts with that of the one that started it.
ANALYZE = """
import json, sys, time
from pathlib import Path
import matplotlib.pyplot, pingouin, scipy.spatial, scipy.stats, sklearn.metrics
from hf_ibnorm.analysis import Measuring, analyze
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
model, output, tokens, skip = sys.argv[1], sys.argv[2], int(sys.argv[3]), tuple(sys.argv[4:])
before, began = peak(), time.perf_counter()
record = analyze([model], output, data="austen", tokens=tokens, measuring=Measuring(skip=skip))
seconds = time.perf_counter() - began
(found,) = record["models"].values()
print(json.dumps({"seconds": seconds, "peak": peak() - before, "tokens": found["tokens"]}))
"""


def write_model(norm: str, folder: Path) -> None:
    """A Llama of the demo's size, of random weights, with a tokenizer of the demo's corpus."""
    torch.manual_seed(0)
    config = IBNormLlamaConfig(**SIZES, vocab_size=2048, max_position_embeddings=256, norm_type=norm)
    IBNormLlamaForCausalLM(config).save_pretrained(folder)
    wrap_tokenizer(train_tokenizer(load_corpus("austen", "train"), 2048), 256).save_pretrained(folder)


def once(folder: Path, tokens: int, part: str) -> dict[str, float]:
    """Seconds after the imports, and peak memory above them."""
    with tempfile.TemporaryDirectory(prefix="hf_ibnorm_analysis_") as output:
        words = ["-c", ANALYZE, str(folder), f"{output}/out", str(tokens), *PARTS[part]]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def analyses(norm: str, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """A row for every part and length."""
    with tempfile.TemporaryDirectory(prefix="hf_ibnorm_analysis_") as folder:
        write_model(norm, Path(folder))
        for part in PARTS:
            for tokens in lengths:
                found = once(Path(folder), tokens, part)
                yield {
                    "what": part,
                    "norm": norm,
                    "tokens": int(found["tokens"]),
                    "seconds": f"{found['seconds']:.0f}",
                    "peak_mb": f"{found['peak'] / 1e6:.0f}",
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", default="layernormalnorm", help="of the model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[25_000, 50_000, 100_000], help="lengths of the text")
    parser.add_argument("--output", type=Path, help="CSV file to write (default: none)")
    arguments = parser.parse_args()
    rows = list(analyses(arguments.norm, arguments.tokens))
    write_rows(rows, ("torch", "transformers", "scipy", "hf_ibnorm"), 1, arguments.output, "cpu")
    for part in PARTS:
        of_part = [row for row in rows if row["what"] == part]
        if (growth := float(of_part[-1]["peak_mb"]) - float(of_part[0]["peak_mb"])) > MEGABYTES:
            raise SystemExit(f"{part}: {growth:.0f} MB more for {of_part[-1]['tokens']} tokens")
    if (slowest := max(float(row["seconds"]) for row in rows)) > SECONDS:
        raise SystemExit(f"{slowest:.0f} s; two minutes are allowed")


if __name__ == "__main__":
    main()
