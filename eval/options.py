"""The flags of `eval run`, which `eval doctor` and a study's `scoring` take too."""

import argparse
import json
from typing import Any

from .suites import SUITES


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number >= 1")
    return value


def _at_least_0(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number >= 0")
    return int(text)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def _shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"got {text!r}, must be i/n with 1 <= i <= n")
    return int(i), int(n)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a JSON object such as '{{\"max_gen_toks\": 256}}'")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser, named as the fields of `runner.Settings`."""
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="directory of a checkpoint with its tokenizer, or of a training run; or a name on the Hub",
    )
    add(
        "--suite",
        "--tasks",
        dest="suite",
        required=True,
        help=f"one of: {', '.join(SUITES)}; or tasks of lm-eval or of --include_path, divided by commas",
    )
    add("--include_path", metavar="DIR", help="folder with task files of your own, in lm-eval's form (default: none)")
    add(
        "--num_fewshot",
        type=_at_least_0,
        metavar="N",
        help="examples in each prompt, a smoke test of a suite (default: each task's own number)",
    )
    add("--mirror", help="folder with the data sets, no network is touched then (default: the Hub)")
    add("--limit", type=positive, help="only the first N items a task, a smoke test (default: all)")
    add(
        "--batch_size",
        type=_batch_size,
        default=8,
        help="sequences at a time; auto on a GPU: all that fit (default: 8)",
    )
    add("--device", help="device of torch (default: cuda if there is one, else cpu)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights (default: auto, the checkpoint's)",
    )
    add(
        "--overlong",
        default="refuse",
        choices=("refuse", "truncate", "skip"),
        help="where prompts are longer than the model's context: stop, cut them from the left, or leave the benchmark "
        "out (default: refuse)",
    )
    add("--skip", type=_names, default=(), metavar="NAMES", help="benchmarks to leave out (default: none)")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help="every N-th benchmark from the I-th (default: 1/1)")
    add("--apply_chat_template", action="store_true", help="put prompts through the chat template (default: not)")
    add("--fewshot_as_multiturn", action="store_true", help="examples as turns of a conversation (default: one prompt)")
    add(
        "--gen_kwargs",
        type=_json_object,
        metavar="JSON",
        help="options of generation instead of the tasks' own, a smoke test (default: the tasks' own)",
    )
    add("--cache", metavar="DIR", help="keep answers there by model and prompt, and use those kept (default: not)")
    add("--ignore", type=_names, default=(), metavar="CHECKS", help="checks that may fail (default: none)")
