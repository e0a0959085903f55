"""Peak memory of turning a text of one line into tokens, by its size.

python benchmarks/long_text.py [--megabytes 10 200] [--threads 2] [--output FILE.csv]

The text is the embedded novels without line breaks, over and over: a .txt, and the one document of a .jsonl. Every
reading is a fresh process that reads the file as training does, into a cache of its own; its peak memory is counted
above what its imports and its tokenizer take. The exit status is 1 where the largest .txt takes 50 MB more than the
smallest, or the largest .jsonl more than 8 bytes a byte: its document has to be held whole, as bytes, as JSON, as text
and as tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results_file import write_rows

from hf_ibnorm.data import load_corpus
from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

KINDS = ("txt", "jsonl")
GROWTH, BYTES_A_BYTE = 50.0, 8.0
# Not getrusage's ru_maxrss: a process starts with that of the one that started it.
READ = """
import json, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from hf_ibnorm.data.tokens import Encoder
from train_lm.cache import Cache
from train_lm.corpus import Files
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
path, tokenizer, cache, threads = sys.argv[1:]
encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer))
encoder.documents(["a word"])
before, began = peak(), time.perf_counter()
documents = Files([Path(path)], "text")
tokens = Cache(cache).tokens(documents.fingerprint, encoder, documents, int(threads))
print(json.dumps({"tokens": len(tokens), "seconds": time.perf_counter() - began, "peak": peak() - before}))
"""


def write_text_of(path: Path, megabytes: float, line: str) -> None:
    """So much text without a line break, as it is or as the one document of a .jsonl."""
    left = round(megabytes * 1e6)
    with path.open("w", encoding="utf-8") as file:
        file.write('{"text": "' if path.suffix == ".jsonl" else "")
        while left > 0:
            left -= file.write(line[:left])
        file.write('"}\n' if path.suffix == ".jsonl" else "")


def once(path: Path, tokenizer: Path, threads: int) -> dict[str, float]:
    """Tokens, seconds and peak memory of one reading."""
    with tempfile.TemporaryDirectory(prefix="hf_ibnorm_text_", dir=path.parent) as cache:
        words = ["-c", READ, str(path), str(tokenizer), cache, str(threads)]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def readings(sizes: list[float], threads: int) -> Iterator[dict[str, Any]]:
    """A row for every kind of file and size."""
    texts = load_corpus("austen", "train")
    line = " ".join(" ".join(texts).replace('"', "'").replace("\\", "/").split()) + " "
    line = line.encode("ascii", "ignore").decode()  # then a character is a byte
    with tempfile.TemporaryDirectory(prefix="hf_ibnorm_text_") as folder:
        tokenizer = Path(folder) / "tokenizer"
        wrap_tokenizer(train_tokenizer(texts, 2048), 256).save_pretrained(tokenizer)
        for kind in KINDS:
            for megabytes in sizes:
                path = Path(folder) / f"line.{kind}"
                write_text_of(path, megabytes, line)
                found = once(path, tokenizer, threads)
                path.unlink()
                yield {
                    "kind": kind,
                    "megabytes": f"{megabytes:g}",
                    "threads": threads,
                    "tokens": int(found["tokens"]),
                    "seconds": f"{found['seconds']:.1f}",
                    "peak_mb": f"{found['peak'] / 1e6:.0f}",
                    "bytes_a_byte": f"{found['peak'] / 1e6 / megabytes:.2f}",
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 200], help="sizes of the text")
    parser.add_argument("--threads", type=int, default=2, help="threads that tokenize (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV file to write (default: none)")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def noted() -> Iterator[dict[str, Any]]:
        for row in readings(arguments.megabytes, arguments.threads):
            rows.append(row)
            yield row

    write_rows(noted(), ("torch", "transformers", "tokenizers", "hf_ibnorm"), 1, arguments.output, "cpu")
    text = [float(row["peak_mb"]) for row in rows if row["kind"] == "txt"]
    if text[-1] - text[0] > GROWTH:
        raise SystemExit(f"txt: {text[-1] - text[0]:.0f} MB more for the largest than for the smallest")
    if (worst := float(rows[-1]["bytes_a_byte"])) > BYTES_A_BYTE:
        raise SystemExit(f"jsonl: {worst} bytes a byte")


if __name__ == "__main__":
    main()
