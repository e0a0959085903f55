"""What a run can be asked for: the fields of `Settings` are the flags of `eval run` and `eval doctor`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from hf_ibnorm.base.errors import UserError, bad_input

from .choice import choose
from .suites import DEFINED, SUITES, Benchmark

CHECKS = (
    *("packages", "punkt", "mirror", "access", "data", "tokenizer", "noise", "logits", "padding"),
    *("batch_size", "context"),
)
"""Names of the checks of `eval doctor`."""


@dataclass(frozen=True)
class Prompting:
    """How prompts are made and answered; what differs from the defaults of the harness changes the scores.

    Args:
        limit: only the first so many items of each task.
        chat_template: put each prompt through the tokenizer's chat template.
        multiturn: give the examples as earlier turns of the conversation.
        generation: options of generation that replace those of the task files.
        shots: examples in each prompt, in place of the tasks' own number.
    """

    limit: int | None = None
    chat_template: bool = False
    multiturn: bool = False
    generation: dict[str, Any] | None = None
    shots: int | None = None

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


def _whole(low: int) -> Any:
    """For argparse: a whole number of at least `low`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number >= {low}")
        return int(text)

    return read


positive = _whole(1)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(positive(text))


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


def _flag(help: str, default: Any = None, *, study: bool = True, **argument: Any) -> Any:
    """A field that is a flag, too: `argument` as argparse takes it; `study` where a study may set it."""
    return field(default=default, metadata={"study": study, "argument": {"help": help, **argument}})


_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SUITE = f"one of: {', '.join(SUITES)}; or tasks of lm-eval or of --include_path, divided by commas"
_INCLUDE = "folder with task files of your own, in lm-eval's form (default: none)"
_SHOTS = "examples in each prompt, a smoke test of a suite (default: each task's own number)"
_OVERLONG = (
    "where prompts are longer than the model's context: stop, cut them from the left, or leave the benchmark out "
    "(default: refuse)"
)
_GENERATION = "options of generation instead of the tasks' own, a smoke test (default: the tasks' own)"
_SHARD = "every N-th benchmark from the I-th (default: 1/1)"
_TEMPLATE = "put prompts through the chat template (default: not)"
_TURNS = "examples as turns of a conversation (default: one prompt)"
_CACHE = "keep answers there by model and prompt, and use those kept (default: not)"


@dataclass(frozen=True)
class Settings:
    """What a run is asked for, beside the model and where its files go; the flags' help says what each field is."""

    suite: str = _flag(_SUITE, MISSING, study=False)
    include_path: str | None = _flag(_INCLUDE, metavar="DIR")
    num_fewshot: int | None = _flag(_SHOTS, type=_whole(0), metavar="N")
    mirror: str | None = _flag("folder with the data sets, no network is touched then (default: the Hub)")
    limit: int | None = _flag("only the first N items a task, a smoke test (default: all)", type=positive)
    batch_size: int | str = _flag("sequences at a time; auto on a GPU: all that fit (default: 8)", 8, type=_batch_size)
    device: str | None = _flag("device of torch (default: cuda if there is one, else cpu)")
    dtype: str = _flag("dtype of the weights (default: auto, the checkpoint's)", "auto", choices=_DTYPES)
    overlong: str = _flag(_OVERLONG, "refuse", choices=("refuse", "truncate", "skip"))
    skip: Sequence[str] = _flag("benchmarks to leave out (default: none)", (), type=_names, metavar="NAMES")
    shard: tuple[int, int] = _flag(_SHARD, (1, 1), study=False, type=_shard, metavar="I/N")
    apply_chat_template: bool = _flag(_TEMPLATE, False, study=False, action="store_true")
    fewshot_as_multiturn: bool = _flag(_TURNS, False, study=False, action="store_true")
    gen_kwargs: dict[str, Any] | None = _flag(_GENERATION, study=False, type=_json_object, metavar="JSON")  # noqa: RUF009
    cache: str | None = _flag(_CACHE, metavar="DIR")
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

        for name in generation:
            if name not in GenerationConfig().to_dict():
                raise UserError(f"gen_kwargs: got {name!r}, which is no option of generation")
        with bad_input(ValueError, TypeError, about="gen_kwargs: "):
            GenerationConfig(**generation).validate()

    def benchmarks(self) -> tuple[str, list[Benchmark]]:
        """The suite's name and what is to be run of it; UserError where a name is unknown, or nothing is left."""
        name, benchmarks = choose(self.suite, self.include_path)
        if self.num_fewshot is not None:
            benchmarks = [replace(each, shots=self.num_fewshot, set_shots=True) for each in benchmarks]
        names = [each.name for each in benchmarks]
        may_fail = [check for check in CHECKS if check != "context"]
        for field_name, values, allowed in (("skip", self.skip, names), ("ignore", self.ignore, may_fail)):
            if unknown := [value for value in values if value not in allowed]:
                raise UserError(f"{field_name}: got {unknown[0]!r}, allowed are {', '.join(allowed)}")
        left = [each for each in benchmarks if each.name not in self.skip][self.shard[0] - 1 :: self.shard[1]]
        if not left:
            raise UserError(f"shard: got {self.shard[0]}/{self.shard[1]}, there are {len(names)} benchmarks")
        return name, left


OF_STUDIES = tuple(each.name for each in fields(Settings) if each.metadata["study"])
"""Settings that a study's `scoring` may have."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add `--model` and the fields of `Settings` to a parser."""
    model = "directory of a checkpoint with its tokenizer, or of a training run; or a name on the Hub"
    parser.add_argument("--model", required=True, help=model)
    for each in fields(Settings):
        flags = [f"--{each.name}", *(["--tasks"] if each.name == "suite" else [])]
        given = {"required": True} if each.default is MISSING else {"default": each.default}
        parser.add_argument(*flags, dest=each.name, **given, **each.metadata["argument"])
