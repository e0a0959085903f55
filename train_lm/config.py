"""The settings of a pretraining run: two dataclasses are the YAML recipe, the command line and its help at once."""

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionConfigFile, ArgumentParser
from transformers import PreTrainedConfig

from hf_ibnorm import IBNormGPT2Config, IBNormLlamaConfig
from hf_ibnorm.cli import UserError, bad_input
from hf_ibnorm.data import CORPORA
from hf_ibnorm.functional import check_choice, check_number
from hf_ibnorm.norms import nearest

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class ModelConfig:
    """The model to train, in Transformers' names.

    Args:
        model_type: architecture, llama or gpt2.
        norm_type: norm at every site: ibnorm_s, ibnorm_l, ibnorm_t, ibnorm_shrink, layernormalnorm, layernorm, rmsnorm
            or dyt.
        norm_kwargs: its options. A whole {...} replaces the recipe's, --model.norm_kwargs.lam 4 merges into it.
        norm_overrides: sites with another norm, a list of [glob, norm], such as '[[layers.0.*, dyt]]', or a mapping;
            norm is a name or {type: ..., kwargs: {...}}; the last match wins.
        vocab_size: rows of the embedding (null: as many as the tokenizer has).
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: attention heads a block.
        num_key_value_heads: key and value heads, Llama only (null: as many as attention heads).
        max_position_embeddings: longest context (null: block_size).
        tie_word_embeddings: share the embedding with the output layer.
        initializer_range: standard deviation of the initial matrices.
        norm_eps: the model's own epsilon (null: 1e-6 for llama, 1e-5 for gpt2).
        dropout: everywhere for gpt2, in the attention for llama.
    """

    model_type: Literal["llama", "gpt2"] = "llama"
    norm_type: str = "ibnorm_l"
    norm_kwargs: dict[str, Any] = field(default_factory=dict)
    norm_overrides: list[Any] | dict[str, Any] = field(default_factory=list)
    vocab_size: int | None = None
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    norm_eps: float | None = None
    dropout: float = 0.0


@dataclass
class TrainConfig:
    """One pretraining run.

    Args:
        run_dir: directory of the run, new or empty.
        seed: of the initial weights, the data order and the noise.
        corpus: embedded corpus, austen or sotu.
        tokenizer_vocab_size: tokens of the byte-level BPE tokenizer trained on the training split (at least 257).
        block_size: tokens a sequence, at most the model's context.
        max_steps: optimizer steps.
        per_device_train_batch_size: sequences a device takes at a time.
        gradient_accumulation_steps: such batches in one step.
        per_device_eval_batch_size: the same for validation.
        learning_rate: peak of the schedule.
        warmup_steps: linear warmup from 0, then a cosine.
        min_lr_rate: where the cosine ends, as a fraction of the peak.
        weight_decay: of AdamW, on matrices only.
        adam_beta1: decay of AdamW's running mean of the gradient.
        adam_beta2: decay of AdamW's running mean of its square.
        adam_epsilon: added to the root of that mean.
        max_grad_norm: gradients are clipped to this norm (0: not at all).
        mixed_precision: no, bf16 or fp16: autocast over float32 weights.
        eval_every: steps between two validations (the last step always has one).
        model: the model.
    """

    run_dir: str
    seed: int = 0
    corpus: str = "austen"
    tokenizer_vocab_size: int = 2048
    block_size: int = 256
    max_steps: int = 400
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    per_device_eval_batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 40
    min_lr_rate: float = 0.1
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    eval_every: int = 100
    model: ModelConfig = field(default_factory=ModelConfig)

    def validate(self) -> None:
        """Check every number and name.

        Raises:
            ValueError, TypeError: naming the field, the value and what is allowed.
        """
        check_choice("corpus", self.corpus, tuple(CORPORA))
        batches = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
        for name in (*batches, "max_steps", "eval_every"):
            check_number(name, getattr(self, name), 1)
        check_number("seed", self.seed, 0, 2**31)
        check_number("block_size", self.block_size, 2)
        check_number("tokenizer_vocab_size", self.tokenizer_vocab_size, 257)
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"):
            check_number(name, getattr(self, name), 0.0)
        for name in ("adam_beta1", "adam_beta2"):
            check_number(name, getattr(self, name), 0.0, 1.0, high_allowed=False)
        check_number("min_lr_rate", self.min_lr_rate, 0.0, 1.0)
        check_number("warmup_steps", self.warmup_steps, 0)
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps: got {self.warmup_steps}, must be <= max_steps = {self.max_steps}")
        model = self.model
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            check_number(f"model.{name}", getattr(model, name), 1)
        for name in ("vocab_size", "num_key_value_heads", "max_position_embeddings"):
            if getattr(model, name) is not None:
                check_number(f"model.{name}", getattr(model, name), 1)
        check_number("model.dropout", model.dropout, 0.0, 1.0, high_allowed=False)
        check_number("model.initializer_range", model.initializer_range, 0.0, 1.0)
        if model.norm_eps is not None:
            check_number("model.norm_eps", model.norm_eps, 0.0)
        for name, whole in (("num_attention_heads", "hidden_size"), ("num_key_value_heads", "num_attention_heads")):
            heads, divided = getattr(model, name), getattr(model, whole)
            if heads is not None and divided % heads:
                raise ValueError(f"model.{name}: got {heads}, must divide model.{whole} = {divided}")
        width = model.hidden_size // model.num_attention_heads
        if model.model_type == "llama" and width % 2:
            raise ValueError(
                f"model.num_attention_heads: got {model.num_attention_heads}, which makes heads {width} wide; "
                "rotary embeddings need an even width"
            )
        context = model.max_position_embeddings
        if context is not None and self.block_size > context:
            raise ValueError(f"block_size: got {self.block_size}, must be <= model.max_position_embeddings = {context}")

    def as_recipe(self) -> dict[str, Any]:
        """Every resolved value but `run_dir`: a recipe that repeats this run."""
        content = asdict(self)
        del content["run_dir"]
        return content


def build_model_config(config: TrainConfig, vocab_size: int | None = None, eos_token_id: int = 0) -> PreTrainedConfig:
    """The Transformers config of the model to train.

    Args:
        config: a validated run.
        vocab_size: of the tokenizer (None while there is none yet: the model's own, or the one asked for).
        eos_token_id: id of the token between documents.

    Raises:
        ValueError, TypeError: a norm or norm option is unknown or not allowed, or the tokenizer does not fit the model.
    """
    model = config.model
    rows = model.vocab_size or vocab_size or config.tokenizer_vocab_size
    if vocab_size is not None and rows < vocab_size:
        raise ValueError(f"model.vocab_size: got {rows}, the tokenizer has {vocab_size} tokens")
    context = model.max_position_embeddings or config.block_size
    shared = {
        "vocab_size": rows,
        "tie_word_embeddings": model.tie_word_embeddings,
        "initializer_range": model.initializer_range,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "norm_type": model.norm_type,
        "norm_kwargs": dict(model.norm_kwargs or {}),
        "norm_overrides": model.norm_overrides,
    }
    if model.model_type == "llama":
        return IBNormLlamaConfig(
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            max_position_embeddings=context,
            attention_dropout=model.dropout,
            rms_norm_eps=1e-6 if model.norm_eps is None else model.norm_eps,
            **shared,
        )
    if model.num_key_value_heads not in (None, model.num_attention_heads):
        raise ValueError(f"model.num_key_value_heads: got {model.num_key_value_heads}, gpt2 has no grouped heads")
    return IBNormGPT2Config(
        n_embd=model.hidden_size,
        n_inner=model.intermediate_size,
        n_layer=model.num_hidden_layers,
        n_head=model.num_attention_heads,
        n_positions=context,
        resid_pdrop=model.dropout,
        embd_pdrop=model.dropout,
        attn_pdrop=model.dropout,
        layer_norm_epsilon=1e-5 if model.norm_eps is None else model.norm_eps,
        **shared,
    )


def resolved(config: TrainConfig, built: IBNormLlamaConfig | IBNormGPT2Config) -> TrainConfig:
    """`config` with every field that was left open set to what `built` made of it."""
    model = replace(
        config.model,
        norm_type=built.norm_type,
        norm_kwargs=built.norm_kwargs,
        norm_overrides=built.norm_overrides,
        vocab_size=built.vocab_size,
        num_key_value_heads=getattr(built, "num_key_value_heads", None),
        max_position_embeddings=built.max_position_embeddings,
        norm_eps=getattr(built, built.norm_eps_field),
    )
    return replace(config, model=model)


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
        description="Pretrain a language model on an embedded corpus. Any field of the recipe can be set as a flag. "
        "The defaults shown are those without --config.",
    )
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help=f"recipe: a YAML file, or the name of a shipped one ({', '.join(shipped_recipes())}); "
        "applied before every other flag, wherever it stands",
    )
    parser.add_class_arguments(TrainConfig)
    return parser


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_command_line(argv: list[str]) -> TrainConfig:
    """The validated run that the command line asks for.

    Raises:
        UserError: one line naming the field, the value and what is allowed.
    """
    argv = _config_first(argv)
    parser = build_parser()
    parsed = parser.parse_args(argv)
    if parsed.model is None:
        raise UserError("model: got null, must be a mapping of the model's fields")
    del parsed["config"]
    config: TrainConfig = TrainConfig(**{**vars(parsed), "model": ModelConfig(**vars(parsed.model))})
    with bad_input():
        config.validate()
    return config


def _config_first(argv: list[str]) -> list[str]:
    """Move `--config X` to the front, or it would win over the flags before it; a bare name is a shipped recipe."""
    rest, configs, words = [], [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        names = shipped_recipes()
        if value in names:
            value = str(RECIPES / f"{value}.yaml")
        elif not Path(value).is_file():
            hint = nearest(value, names)
            raise UserError(f"config: got {value!r}, no such file; shipped recipes are {', '.join(names)}{hint}")
        configs += ["--config", value]
    return configs + rest
