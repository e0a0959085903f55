"""The options of a run: the fields of `Settings` are the flags of `eval run` and `eval doctor`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from typing import Any

from hf_ibnorm.base.errors import UserError, bad_input

from .suites import DEFINED, SUITES, Benchmark, choose

SMOKE = "SMOKE - not a leaderboard score"
IGNORABLE = ("packages", "punkt", "mirror", "access", "data", "tokenizer", "noise", "logits", "padding", "batch_size")
"""Checks of `eval doctor` that may fail if `--ignore` names them."""


@dataclass(frozen=True)
class Prompting:
    """How prompts are made and answered, as a manifest has it: `limit`, `apply_chat_template`, `fewshot_as_multiturn`,
    `gen_kwargs` and `num_fewshot` of `Settings`, which change the scores."""

    limit: int | None = None
    chat_template: bool = False
    multiturn: bool = False
    generation: dict[str, Any] | None = None
    shots: int | None = None

    def for_harness(self) -> dict[str, Any]:
        """Arguments of the functions of lm-eval that make prompts."""
        return {"limit": self.limit, "apply_chat_template": self.chat_template, "fewshot_as_multiturn": self.multiturn}

    def stamp(self, suite: str) -> str:
        """The mark of scores that no leaderboard has; "" where there is no reason for it."""
        return SMOKE if self.smoke(suite) else ""

    def smoke(self, suite: str) -> list[str]:
        """The settings with which a run of `suite` gives no leaderboard score."""
        fixed = any(name in SUITES or name in DEFINED for name in suite.split(","))  # their number of examples
        reasons = {
            f"--limit {self.limit}": self.limit is not None,
            "changed generation settings": bool(self.generation),
            f"--num_fewshot {self.shots}": fixed and self.shots is not None,
        }
        return [reason for reason, given in reasons.items() if given]

    def notes(self) -> list[str]:
        """Sentences about the prompts that stand beside the scores."""
        turns = ", examples as turns" if self.multiturn else ""
        shots = [] if self.shots is None else [f"with {self.shots} examples in each prompt, as --num_fewshot says"]
        return shots + ([f"with the tokenizer's chat template{turns}"] if self.chat_template else [])


def _whole(text: str, low: int = 0) -> int:
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number >= {low}")
    return int(text)


positive = partial(_whole, low=1)


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


def _flag(help: str, default: Any = None, **argument: Any) -> Any:
    """A field that is a flag, too; `argument` as argparse takes it."""
    return field(default=default, metadata={"help": help, **argument})


_SUITE = f"one of: {', '.join(SUITES)}; or tasks of lm-eval or of --include_path, divided by commas"
_SHOTS = "examples in each prompt, a smoke test of a suite (default: each task's own number)"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_OVERLONG = (
    "where prompts are longer than the model's context: stop, cut them from the left, or leave the benchmark out "
    "(default: refuse)"
)
_SHARD = "every N-th benchmark from the I-th (default: 1/1)"
_GENERATION = "options of generation instead of the tasks' own, a smoke test (default: the tasks' own)"


@dataclass(frozen=True)
class Settings:
    """The options of a run beside the model and the folder of its files; the flags' help explains each field."""

    suite: str = _flag(_SUITE, MISSING)
    include_path: str | None = _flag("folder of your own task files, in lm-eval's form (default: none)", metavar="DIR")
    num_fewshot: int | None = _flag(_SHOTS, type=_whole, metavar="N")
    mirror: str | None = _flag("folder with the data sets, no network is touched then (default: the Hub)")
    limit: int | None = _flag("only the first N items a task, a smoke test (default: all)", type=positive)
    batch_size: int | str = _flag("sequences at a time; auto on a GPU: all that fit (default: 8)", 8, type=_batch_size)
    device: str | None = _flag("device of torch (default: cuda if there is one, else cpu)")
    dtype: str = _flag("dtype of the weights (default: auto, the checkpoint's)", "auto", choices=_DTYPES)
    overlong: str = _flag(_OVERLONG, "refuse", choices=("refuse", "truncate", "skip"))
    skip: Sequence[str] = _flag("benchmarks to leave out (default: none)", (), type=_names, metavar="NAMES")
    shard: tuple[int, int] = _flag(_SHARD, (1, 1), type=_shard, metavar="I/N")
    apply_chat_template: bool = _flag("put prompts into the chat template (default: not)", False, action="store_true")
    fewshot_as_multiturn: bool = _flag("examples as turns of a conversation (default: not)", False, action="store_true")
    gen_kwargs: dict[str, Any] | None = _flag(_GENERATION, type=_json_object, metavar="JSON")  # noqa: RUF009
    cache: str | None = _flag("keep answers in DIR by model and prompt, and use them (default: not)", metavar="DIR")
    ignore: Sequence[str] = _flag("checks that may fail (default: none)", (), type=_names, metavar="CHECKS")

    @property
    def prompting(self) -> Prompting:
        """How prompts are made and answered."""
        turns = self.apply_chat_template, self.fewshot_as_multiturn
        return Prompting(self.limit, *turns, self.gen_kwargs, self.num_fewshot)

    def check(self) -> None:
        """Raise UserError where settings do not go together."""
        from .model import processes

        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise UserError("fewshot_as_multiturn: needs --apply_chat_template, there are no turns without one")
        if self.cache and processes() > 1:
            raise UserError("cache: cannot be used by several processes at once; leave --cache out")
        generation = dict(self.gen_kwargs or {})
        room, until = generation.pop("max_gen_toks", 1), generation.pop("until", [])
        if type(room) is not int or room < 1:
            raise UserError(f"gen_kwargs: got max_gen_toks {room!r}, must be a whole number >= 1")
        if not isinstance(until, list) or not all(isinstance(each, str) for each in until):
            raise UserError(f"gen_kwargs: got until {until!r}, must be a list of strings")
        from transformers import GenerationConfig

        if unknown := generation.keys() - GenerationConfig().to_dict().keys():
            raise UserError(f"gen_kwargs: got {min(unknown)!r}, which is no option of generation")
        with bad_input(ValueError, TypeError, about="gen_kwargs: "):
            GenerationConfig(**generation).validate()

    def benchmarks(self) -> list[Benchmark]:
        """The benchmarks to run; UserError where a name is unknown, or nothing is left."""
        benchmarks = choose(self.suite, self.include_path)
        if self.num_fewshot is not None:
            benchmarks = [replace(each, shots=self.num_fewshot, set_shots=True) for each in benchmarks]
        names = [each.name for each in benchmarks]
        for option, values, allowed in (("skip", self.skip, names), ("ignore", self.ignore, IGNORABLE)):
            if unknown := [value for value in values if value not in allowed]:
                raise UserError(f"{option}: got {unknown[0]!r}, allowed are {', '.join(allowed)}")
        i, n = self.shard
        left = [each for each in benchmarks if each.name not in self.skip][i - 1 :: n]
        if not left:
            raise UserError(f"shard: got {i}/{n}, there are {len(names)} benchmarks")
        return left


_OF_A_COMMAND = ("suite", "shard", "apply_chat_template", "fewshot_as_multiturn", "gen_kwargs")
OF_STUDIES = tuple(each.name for each in fields(Settings) if each.name not in _OF_A_COMMAND)
"""Settings that a study's `scoring` may have."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add `--model` and the fields of `Settings` to a parser."""
    model = "directory of a checkpoint with its tokenizer, or of a training run; or a name on the Hub"
    parser.add_argument("--model", required=True, help=model)
    for each in fields(Settings):
        flags = [f"--{each.name}", *(["--tasks"] if each.name == "suite" else [])]
        default = {"required": True} if each.default is MISSING else {"default": each.default}
        parser.add_argument(*flags, dest=each.name, **default, **each.metadata)
