"""The command line of `python -m train_lm`: a recipe, flags over its fields, and errors of one line."""

import operator
import re
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from hf_ibnorm.base.command import OneLineParser
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.reading import read_yaml, reading
from hf_ibnorm.checks import nearest
from hf_ibnorm.data import CORPORA
from hf_ibnorm.swap.families import WITH_FILES

from .architecture import build_model_config, idle_sizes
from .settings import SIZES, ModelConfig, TrainConfig

RECIPES = Path(__file__).parent / "recipes"


class _Parser(ArgumentParser):
    """jsonargparse with errors of one line, in this project's words, with the nearest field for an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        text = " ".join(line.strip(" -") for line in str(message).splitlines())
        text = re.sub(r'Parser key "([\w.]+)":', r"\1:", text)
        text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.Literal", "one of ")
        text = re.sub(r"^([\w.]+): Expected an? (.+?)\. Got value: (.*)$", r"\1: got '\3', must be \2", text)
        known = sorted({action.dest for action in self._actions} - {"help", "config"})
        unknown = [name for name in re.findall(r"(?:--|')([\w.]+)", text) if name not in known]
        raise UserError(text + next(filter(None, (nearest(name, known) for name in unknown)), ""))


def build_parser() -> ArgumentParser:
    """The command line of `python -m train_lm`."""
    parser = _Parser(
        prog="train_lm",
        allow_abbrev=False,  # read_command_line looks for --config in full
        description="Pretrain a language model. Any field of the recipe can be set as a flag. "
        "The defaults shown are those without --config.",
    )
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help=f"recipe: a YAML file, or the name of a shipped one ({', '.join(shipped_recipes())}); "
        "applied before every other flag, wherever it stands",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check the settings, and print the recipe that they make (default: train)",
    )
    parser.add_class_arguments(TrainConfig)
    return parser


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_command_line(argv: list[str]) -> TrainConfig:
    """The validated run that the command line asks for. With `--check` its recipe is printed, and the program ends."""
    # jsonargparse applies a config file where it stands among the flags: one behind them would win over them.
    first = OneLineParser(prog="train_lm", add_help=False)
    first.add_argument("--config", action="append", default=[])
    recipes, flags = first.parse_known_args(argv)
    parser = build_parser()
    parsed = parser.parse_args([*(f"--config={_recipe(name)}" for name in recipes.config), *flags])
    if parsed.model is None:
        raise UserError("model: got null, must be a mapping of the model's fields")
    only_check = parsed.check
    del parsed["config"], parsed["check"]
    config: TrainConfig = TrainConfig(**{**vars(parsed), "model": ModelConfig(**vars(parsed.model))})
    with bad_input():
        config.validate()
        if only_check and config.model.init_from is None:
            build_model_config(config)
    given = parser.parse_args([f"--run_dir={config.run_dir}", *flags], defaults=False)  # it may stand in the recipe
    _refuse_idle(config, set(given.keys()))
    if only_check:
        print(yaml.safe_dump(config.as_recipe(), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def _recipe(name: str) -> str:
    """The path of a recipe, given as the name of a shipped one or as a YAML file; UserError where it is no recipe."""
    names = shipped_recipes()
    if name in names:
        return str(RECIPES / f"{name}.yaml")
    with reading("config", name[:100]):  # a name may be too long, or hold a zero byte
        is_file = Path(name).is_file()
    if not is_file:
        hint = nearest(name, names)
        raise UserError(f"config: got {name!r}, no such file; shipped recipes are {', '.join(names)}{hint}")
    read_yaml("config", Path(name), {"model?": (dict, type(None))})
    return name


def _refuse_idle(config: TrainConfig, flags: set[str]) -> None:
    """Raise UserError where one of `flags` does nothing beside the other settings, so that nobody believes it did.

    Only flags: a recipe lists every field, used or not. A flag with the default value takes back a recipe's value.
    """
    starts = config.model.init_from is not None
    embedded = config.corpus in CORPORA and config.validation_corpus is None
    splits = "corpus_config train_split validation_split validation_every"
    trained = "tokenizer_vocab_size tokenizer_documents"
    no_training = "a tokenizer is given, and none is trained"
    of_a_checkpoint = " ".join(f"model.{name}" for name in ("model_type", "config_kwargs", *SIZES) if name != "dropout")
    defaults = TrainConfig("")
    sizes = {f"model.{name}" for name in SIZES}
    absent = ""
    if config.model.model_type not in WITH_FILES and not starts and sizes & flags:  # those two have all
        with bad_input():
            absent = " ".join(f"model.{name}" for name in idle_sizes(config.model.model_type))
    for names, is_idle, why in (
        ("lora_rank lora_alpha lora_targets", config.trainable != "lora", "trainable is not lora"),
        ("distillation_weight distillation_temperature", config.teacher is None, "there is no teacher"),
        (trained, config.tokenizer is not None or starts, no_training),
        ("gradient_accumulation_steps", config.global_batch_size is not None, "global_batch_size decides it"),
        ("tracker_project", {*config.log_with} <= {"tensorboard"}, "only other trackers have projects"),
        ("shuffle_buffer", not config.streaming, "streaming is false"),
        ("validation_every", config.validation_corpus is not None, "validation_corpus is given"),
        ("validation_every", config.streaming, "nothing is held out of a stream"),
        (splits, embedded, "an embedded corpus has its own splits"),
        ("text_field", embedded, "an embedded corpus has no fields"),
        (of_a_checkpoint, starts, "model.init_from has its own"),
        (absent, True, f"the config of {config.model.model_type} has no such field"),
    ):
        for name in names.split() if is_idle else ():
            value = operator.attrgetter(name)
            if name in flags and value(config) != value(defaults):
                raise UserError(f"{name}: got {value(config)!r}, which nothing would use: {why}; leave it out")
