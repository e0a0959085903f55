"""The command line of `python -m train_lm`: a recipe, flags over its fields, and errors of one line."""

import re
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from hf_ibnorm.base.command import OneLineParser
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.reading import read_yaml, reading
from hf_ibnorm.checks import nearest

from .architecture import build_model_config
from .idle import refuse_idle
from .settings import ModelConfig, TrainConfig

RECIPES = Path(__file__).parent / "recipes"


class _Parser(ArgumentParser):
    """jsonargparse with errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        raise UserError(_one_line(str(message), self))


def _one_line(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message in this project's words, with the nearest field where one was not known."""
    text = " ".join(line.strip(" -") for line in message.splitlines())
    text = re.sub(r'Parser key "([\w.]+)":', r"\1:", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.Literal", "one of ")
    text = re.sub(r"^([\w.]+): Expected an? (.+?)\. Got value: (.*)$", r"\1: got '\3', must be \2", text)
    known = sorted({action.dest for action in parser._actions} - {"help", "config"})
    for flag, quoted in re.findall(r"--([\w.]+)|'([\w.]+)'", text):
        if (flag or quoted) not in known and (hint := nearest(flag or quoted, known)):
            return text + hint
    return text


def build_parser() -> ArgumentParser:
    """The command line of `python -m train_lm`."""
    parser = _Parser(
        prog="train_lm",
        allow_abbrev=False,  # --confi would slip past _config_first
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
    """The validated run that the command line asks for. With `--check` its recipe is printed, and the program ends.

    Raises:
        UserError: one line naming the field, the value and what is allowed.
    """
    argv = _config_first(argv)
    parser = build_parser()
    parsed = parser.parse_args(argv)
    if parsed.model is None:
        raise UserError("model: got null, must be a mapping of the model's fields")
    only_check = parsed.check
    del parsed["config"], parsed["check"]
    config: TrainConfig = TrainConfig(**{**vars(parsed), "model": ModelConfig(**vars(parsed.model))})
    with bad_input():
        config.validate()
        if only_check and config.model.init_from is None:
            build_model_config(config)
    refuse_idle(config, {word[2:].partition("=")[0] for word in argv if word.startswith("--")})
    if only_check:
        print(yaml.safe_dump(config.as_recipe(), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def _config_first(argv: list[str]) -> list[str]:
    """Move `--config X` to the front, or it would win over the flags before it; a bare name is a shipped recipe."""
    parser = OneLineParser(prog="train_lm", add_help=False)
    parser.add_argument("--config", action="append", default=[])
    given, rest = parser.parse_known_args(argv)
    return [word for name in given.config for word in ("--config", _recipe(name))] + rest


def _recipe(name: str) -> str:
    """The path of a recipe, which is a YAML file or the name of a shipped one.

    Raises:
        UserError: there is no such file, or it is no recipe.
    """
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
