"""The settings of a training run: two dataclasses are the YAML recipe, the command line and its help at once."""

import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.reading import read_yaml, reading
from hf_ibnorm.checks import LARGEST, check_choice, check_number, nearest
from hf_ibnorm.report.runs import HARMLESS, flat_settings

from .idle import refuse_idle

if TYPE_CHECKING:
    from hf_ibnorm import IBNormGPT2Config, IBNormLlamaConfig

RECIPES = Path(__file__).parent / "recipes"
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "aim", "comet_ml", "dvclive", "swanlab")


@dataclass
class ModelConfig:
    """The model to train, in Transformers' names.

    Args:
        model_type: architecture, llama or gpt2.
        init_from: directory or name of a Llama or GPT-2 checkpoint to start from, stock or ours; its sizes and
            epsilon take the place of those here, its tokenizer is the run's unless another one is given.
        norm_type: norm at every site: ibnorm_s, ibnorm_l, ibnorm_t, ibnorm_shrink, layernormalnorm, layernorm, rmsnorm
            or dyt (null, with init_from only: the norms that checkpoint has).
        norm_kwargs: its options; of a norm that init_from has already, those to change. A whole {...} replaces the
            recipe's, --model.norm_kwargs.lam 4 merges into it.
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
        dtype: of the weights, float32; for bfloat16 arithmetic see mixed_precision.
    """

    model_type: Literal["llama", "gpt2"] = "llama"
    init_from: str | None = None
    norm_type: str | None = "ibnorm_l"
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
    dtype: str = "float32"


@dataclass
class TrainConfig:
    """One pretraining run.

    Args:
        run_dir: directory of the run, new or empty unless resume says otherwise.
        resume: no; auto (go on from the newest whole checkpoint in run_dir, to the bit; from step 0 where there are
            none); or inexact (the same even where the machine or the software computes other bits by now).
        seed: of the initial weights, the data order and the noise.
        corpus: embedded corpus (austen, sotu); file, glob or folder of .txt, .jsonl or .parquet, also as .gz, .xz or
            .zst; or name of a dataset of the datasets library, on the Hub or saved to disk.
        corpus_config: configuration of a dataset, such as en for allenai/c4.
        train_split: split of a dataset to train on.
        validation_split: split of a dataset to validate on.
        validation_corpus: where validation text comes from if the corpus has none (null: it is held out).
        validation_every: hold out one document in so many, beginning with the first; not for streaming.
        text_field: where a line or row of the corpus, and of validation_corpus, has its text.
        streaming: read, shuffle and tokenize the corpus while training, instead of tokenizing it first.
        shuffle_buffer: streaming: documents among which the next one is drawn.
        tokenizer: directory or name of a tokenizer (null: a byte-level BPE is trained on the training split).
        tokenizer_vocab_size: tokens of the tokenizer that is trained (at least 257).
        tokenizer_documents: documents it is trained on (null: all; streaming: the first 10000).
        tokenizer_threads: threads that tokenize.
        add_bos: whether documents begin with the tokenizer's BOS token: true, false, or auto (where the tokenizer
            begins texts with one, as eval does then, that is not its EOS token as well).
        max_bad_documents: documents of a pass that cannot be read and are left out, in a stream by each process; one
            more ends the run.
        cache_dir: where tokens are kept between runs (null: $HF_IBNORM_CACHE, or else ~/.cache/hf_ibnorm).
        block_size: tokens a sequence, at most the model's context.
        max_steps: optimizer steps.
        global_batch_size: sequences a step, over all devices (null: what the next two and the number of devices make).
        per_device_train_batch_size: sequences a device takes at a time; with global_batch_size, at most.
        gradient_accumulation_steps: such batches in one step; with global_batch_size, as many as that takes.
        per_device_eval_batch_size: the same for validation.
        learning_rate: peak of the schedule.
        warmup_steps: linear warmup from 0, then a cosine.
        min_lr_rate: where the cosine ends, as a fraction of the peak.
        weight_decay: of AdamW, on matrices only.
        adam_beta1: decay of AdamW's running mean of the gradient.
        adam_beta2: decay of AdamW's running mean of its square.
        adam_epsilon: added to the root of that mean.
        max_grad_norm: gradients are clipped to this norm (0: not at all).
        lam_schedule: strength of IBNorm: constant, or linear from where nothing is compressed (lam 0, ibnorm_s: 1) to
            what norm_kwargs say.
        lam_warmup_steps: steps of the linear schedule.
        trainable: all; norms (the rest stays as it is, to the bit); or lora: norms, and LoRA adapters on linear layers,
            merged into every model that is saved.
        lora_rank: rank of an adapter.
        lora_alpha: an adapter's product is multiplied by this over its rank.
        lora_targets: names of the linear layers that get one, such as [q_proj, v_proj] (null: all in the blocks).
        teacher: directory or name of a Llama or GPT-2, stock or ours, with the same tokenizer, whose logits are
            distilled (null: none).
        distillation_weight: w in loss = (1 - w) cross-entropy + w T^2 KL(teacher || student); with a teacher, not 0.
        distillation_temperature: T, by which both models' logits are divided in KL.
        mixed_precision: no, bf16 or fp16: autocast over float32 weights.
        compile: compile each block with torch.compile; the first step then takes a minute or more.
        gradient_checkpointing: keep each block's input only and compute the rest again for the gradients: less memory,
            about a third more arithmetic, the same gradients.
        deterministic: on a GPU, use algorithms that give the same bits each time, where there are any; slower.
        eval_every: steps between two validations (the last step always has one).
        max_eval_blocks: blocks of the validation split that are used (null: all).
        checkpoint_every: steps between two checkpoints (0: only where a signal stops the run).
        keep_last: checkpoints kept, the newest ones; step 0 is always kept.
        keep_every: checkpoints at multiples of this step are kept too (0: none).
        max_skipped_steps: steps in a row without a finite loss and gradient that end the run; each is skipped, and a
            run that has skipped a quarter of all its steps is a failure, too.
        watch_norms: every so many steps, and at the first and the last one, write what goes into and out of every norm
            in that step to norms.jsonl, and a little of it to the trackers (0: never; not with compile).
        push_to_hub: repository on the Hub, NAMESPACE/NAME, that the finished model is pushed to, privately, with a card
            (null: none).
        log_with: trackers besides metrics.jsonl: tensorboard, wandb, mlflow, trackio, aim, comet_ml, dvclive, swanlab.
        tracker_project: project, or experiment, that the run has at these trackers, TensorBoard apart.
        progress_seconds: seconds between two lines of progress where the output is no terminal (0: only validations).
        ddp_timeout: seconds that a process waits for the others, however the run is spread: one machine may tokenize,
            or read a checkpoint, for longer than another.
        model: the model.
    """

    run_dir: str
    resume: Literal["no", "auto", "inexact"] = "no"
    seed: int = 0
    corpus: str = "austen"
    corpus_config: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    validation_corpus: str | None = None
    validation_every: int = 100
    text_field: str = "text"
    streaming: bool = False
    shuffle_buffer: int = 10_000
    tokenizer: str | None = None
    tokenizer_vocab_size: int = 2048
    tokenizer_documents: int | None = None
    tokenizer_threads: int = 2
    add_bos: bool | Literal["auto"] = "auto"
    max_bad_documents: int = 0
    cache_dir: str | None = None
    block_size: int = 256
    max_steps: int = 400
    global_batch_size: int | None = None
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
    lam_schedule: Literal["constant", "linear"] = "constant"
    lam_warmup_steps: int = 0
    trainable: Literal["all", "norms", "lora"] = "all"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: list[str] | None = None
    teacher: str | None = None
    distillation_weight: float = 0.5
    distillation_temperature: float = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    gradient_checkpointing: bool = False
    deterministic: bool = True
    eval_every: int = 100
    max_eval_blocks: int | None = None
    checkpoint_every: int = 100
    keep_last: int = 2
    keep_every: int = 0
    max_skipped_steps: int = 10
    watch_norms: int = 0
    push_to_hub: str | None = None
    log_with: list[str] = field(default_factory=lambda: ["tensorboard"])
    tracker_project: str = "hf_ibnorm"
    progress_seconds: float = 60.0
    ddp_timeout: int = 7200
    model: ModelConfig = field(default_factory=ModelConfig)

    def validate(self) -> None:
        """Check every number and name.

        Raises:
            ValueError, TypeError: naming the field, the value and what is allowed.
        """
        for name, low in _LEAST.items():
            if (value := getattr(self, name)) is not None:
                check_number(name, value, low, _MOST.get(name, LARGEST if isinstance(low, int) else math.inf))
        check_number("seed", self.seed, 0, 2**31)
        for name in ("adam_beta1", "adam_beta2"):
            check_number(name, getattr(self, name), 0.0, 1.0, high_allowed=False)
        check_number("min_lr_rate", self.min_lr_rate, 0.0, 1.0)
        for name in ("warmup_steps", "lam_warmup_steps"):
            check_number(name, getattr(self, name), 0)
            if getattr(self, name) > self.max_steps:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be <= max_steps = {self.max_steps}")
        if self.keep_every and (not self.checkpoint_every or self.keep_every % self.checkpoint_every):
            raise ValueError(
                f"keep_every: got {self.keep_every}, must be a multiple of checkpoint_every = {self.checkpoint_every}, "
                "or there are no checkpoints at its steps to keep"
            )
        if (self.lam_schedule == "linear") != bool(self.lam_warmup_steps):
            allowed = "be >= 1 with lam_schedule linear and 0 with constant"
            raise ValueError(f"lam_warmup_steps: got {self.lam_warmup_steps}, must {allowed}")
        if self.watch_norms and self.compile:
            raise ValueError(
                f"watch_norms: got {self.watch_norms}, must be 0 with compile true, because compiled blocks run no "
                "hooks; or set compile to false"
            )
        self._validate_healing()
        if self.push_to_hub is not None:
            from .push import check_repo

            check_repo("push_to_hub", self.push_to_hub)
        for name in self.log_with:
            check_choice("log_with", name, TRACKERS)
        if not self.tracker_project.strip():
            raise ValueError(f"tracker_project: got {self.tracker_project!r}, must be a name")
        check_number("ddp_timeout", self.ddp_timeout, 1, 10**8)  # of which a timedelta can still count nanoseconds
        self._validate_model()

    def _validate_healing(self) -> None:
        if self.trainable != "all" and self.model.init_from is None:
            raise ValueError(
                f"model.init_from: got null, must be the directory or name of a checkpoint where trainable is "
                f"{self.trainable}"
            )
        for name in ("lora_alpha", "distillation_temperature"):
            check_number(name, getattr(self, name), 0.0)
            if not getattr(self, name):
                raise ValueError(f"{name}: got 0, must be > 0")
        if self.lora_targets == []:
            raise ValueError("lora_targets: got [], must name a layer, or be null for all")
        check_number("distillation_weight", self.distillation_weight, 0.0, 1.0)
        if self.teacher is not None and not self.distillation_weight:
            raise ValueError("distillation_weight: got 0, must be > 0 with a teacher; or set teacher to null")

    def _validate_model(self) -> None:
        model = self.model
        if model.dtype != "float32":
            raise ValueError(
                f"model.dtype: got {model.dtype!r}, must be 'float32': in bfloat16 a gain near 1 never moves, its "
                "updates round away; for bfloat16 arithmetic over float32 weights set mixed_precision to bf16"
            )
        if model.norm_type is None and model.init_from is None:
            raise ValueError(
                "model.norm_type: got null, which keeps the norms of model.init_from; must be a norm's name"
            )
        if model.norm_type is None and model.norm_overrides:
            raise ValueError("model.norm_type: got null, must be a norm's name where model.norm_overrides are given")
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            check_number(f"model.{name}", getattr(model, name), 1)
        for name in ("vocab_size", "num_key_value_heads", "max_position_embeddings"):
            if getattr(model, name) is not None:
                check_number(f"model.{name}", getattr(model, name), 1)
        check_number("model.dropout", model.dropout, 0.0, 1.0, high_allowed=False)
        check_number("model.initializer_range", model.initializer_range, 0.0, 1.0)
        if model.norm_eps is not None:
            check_number("model.norm_eps", model.norm_eps, 0.0)
        if model.init_from is not None:
            return  # the sizes are the checkpoint's
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
        self.check_context(model.max_position_embeddings)

    def check_context(self, context: int | None) -> None:
        """Raise ValueError where a block does not fit into a model's `context`."""
        if context is not None and self.block_size > context:
            raise ValueError(f"block_size: got {self.block_size}, must be <= model.max_position_embeddings = {context}")

    def spread_over(self, processes: int) -> "TrainConfig":
        """These settings with the step's sequences dealt out to so many processes.

        Without `global_batch_size` they stay as they are. With it a process takes as many sequences at a time as fit
        into `per_device_train_batch_size` and divide its share, and as many times as the share needs.

        Raises:
            ValueError: the processes cannot have equal shares.
        """
        if self.global_batch_size is None:
            return self
        share, rest = divmod(self.global_batch_size, processes)
        if rest or not share:
            raise ValueError(
                f"global_batch_size: got {self.global_batch_size}, must be a multiple of the number of processes, "
                f"{processes}"
            )
        size = max(size for size in range(1, min(self.per_device_train_batch_size, share) + 1) if share % size == 0)
        return replace(self, per_device_train_batch_size=size, gradient_accumulation_steps=share // size)

    def as_recipe(self) -> dict[str, Any]:
        """Every resolved value but `run_dir` and `resume`: a recipe that repeats this run."""
        content = asdict(self)
        del content["run_dir"], content["resume"]
        return content


_LEAST: dict[str, float] = {
    **dict.fromkeys(("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("global_batch_size", "per_device_eval_batch_size", "eval_every"), 1),
    **dict.fromkeys(("max_eval_blocks", "keep_last", "lora_rank"), 1),
    **dict.fromkeys(("shuffle_buffer", "tokenizer_documents", "tokenizer_threads", "max_skipped_steps"), 1),
    **dict.fromkeys(("checkpoint_every", "keep_every", "watch_norms", "max_bad_documents"), 0),
    **dict.fromkeys(("block_size", "validation_every"), 2),
    "tokenizer_vocab_size": 257,
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "progress_seconds"), 0.0),
}
"""The least value of each number; an integer where only integers are allowed."""

_MOST = {"tokenizer_threads": 1024}

_SAME_BUT_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")

# Field of ModelConfig → attribute of the family's config.
_NAMES = {
    "llama": {name: name for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    | {"num_key_value_heads": "num_key_value_heads", "max_position_embeddings": "max_position_embeddings"}
    | {"norm_eps": "rms_norm_eps", "dropout": "attention_dropout"},
    "gpt2": {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer"}
    | {"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}
    | {"norm_eps": "layer_norm_epsilon", "dropout": "resid_pdrop"},
}
for _names in _NAMES.values():
    _names |= {name: name for name in ("vocab_size", "tie_word_embeddings", "initializer_range")}
_EPS = {"llama": 1e-6, "gpt2": 1e-5}
DROPOUTS = {"llama": ("attention_dropout",), "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
"""Attributes of a family's config that the field `dropout` sets."""


def build_model_config(
    config: TrainConfig, vocab_size: int | None = None, eos_token_id: int = 0
) -> "IBNormLlamaConfig | IBNormGPT2Config":
    """The Transformers config of the model to train, where it does not start from a checkpoint.

    Args:
        config: a validated run.
        vocab_size: of the tokenizer (None while there is none yet: the model's own, or the one asked for).
        eos_token_id: id of the token between documents.

    Raises:
        ValueError, TypeError: a norm or norm option is unknown or not allowed, or the tokenizer does not fit the model.
    """
    from hf_ibnorm import IBNormGPT2Config, IBNormLlamaConfig

    model = config.model
    rows = model.vocab_size or vocab_size or config.tokenizer_vocab_size
    check_vocabulary(rows, vocab_size)
    if model.model_type == "gpt2" and model.num_key_value_heads not in (None, model.num_attention_heads):
        raise ValueError(f"model.num_key_value_heads: got {model.num_key_value_heads}, gpt2 has no grouped heads")
    given = {
        **asdict(model),
        "vocab_size": rows,
        "max_position_embeddings": model.max_position_embeddings or config.block_size,
        "norm_eps": _EPS[model.model_type] if model.norm_eps is None else model.norm_eps,
    }
    values = {attribute: given[name] for name, attribute in _NAMES[model.model_type].items()}
    if model.model_type == "gpt2":
        values |= dict.fromkeys(DROPOUTS["gpt2"], model.dropout)
    family = IBNormLlamaConfig if model.model_type == "llama" else IBNormGPT2Config
    return family(
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        norm_type=model.norm_type,
        norm_kwargs=dict(model.norm_kwargs or {}),
        norm_overrides=model.norm_overrides,
        **values,
    )


def check_vocabulary(rows: int, vocab_size: int | None) -> None:
    """Raise ValueError where a tokenizer has more tokens than the embedding has rows."""
    if vocab_size is not None and rows < vocab_size:
        raise ValueError(f"model.vocab_size: got {rows}, the tokenizer has {vocab_size} tokens")


def resolved(config: TrainConfig, built: "IBNormLlamaConfig | IBNormGPT2Config") -> TrainConfig:
    """`config` with every field of the model that was left open, or that a checkpoint decided, set to what it is."""
    model_type: Any = built.model_type.removeprefix("ibnorm_")
    values = {name: getattr(built, attribute) for name, attribute in _NAMES[model_type].items()}
    if values["intermediate_size"] is None:
        values["intermediate_size"] = 4 * values["hidden_size"]  # what GPT-2 makes of it
    model = replace(
        config.model,
        model_type=model_type,
        norm_type=built.norm_type,
        norm_kwargs=built.norm_kwargs,
        norm_overrides=built.norm_overrides,
        **values,
    )
    return replace(config, model=model)


def changed_fields(then: dict[str, Any], now: dict[str, Any], processes: tuple[int, int]) -> list[str]:
    """What keeps a run from being resumed with other settings: "field was X, got Y" for each that matters.

    Args:
        then: `as_recipe()` of the run.
        now: the same of the settings it is to go on with.
        processes: number of processes then and now. Where it changed, the batch may be split in another way.
    """

    # A field that an earlier release did not have was what its default is, but for BOS: it set none.
    known = {**flat_settings(TrainConfig("").as_recipe()), "add_bos": False}
    before, after = {**known, **flat_settings(then)}, flat_settings(now)
    sizes = [
        each * math.prod(side[name] for name in _SAME_BUT_SPLIT)
        for each, side in zip(processes, (before, after), strict=True)
    ]
    free = HARMLESS | (set(_SAME_BUT_SPLIT) if sizes[0] == sizes[1] and processes[0] != processes[1] else set())
    found = [
        f"{name} was {before.get(name)!r}, got {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if name not in free and before.get(name) != after.get(name)
    ]
    if not found and sizes[0] != sizes[1]:
        found.append(
            f"a step had {sizes[0]} sequences with {processes[0]} processes, with {processes[1]} it has {sizes[1]}; "
            "set gradient_accumulation_steps or per_device_train_batch_size so that it has as many"
        )
    return found


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


def _is_file(path: str) -> bool:
    with reading("config", path[:100]):  # a name may be too long, or hold a zero byte
        return Path(path).is_file()


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
        elif not _is_file(value):
            hint = nearest(value, names)
            raise UserError(f"config: got {value!r}, no such file; shipped recipes are {', '.join(names)}{hint}")
        else:
            read_yaml("config", Path(value), {"model?": (dict, type(None))})
        configs += ["--config", value]
    return configs + rest
