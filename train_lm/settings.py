"""The settings of a training run: two dataclasses are the YAML recipe, the command line and its help at once."""

import math
import operator
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.checks import LARGEST, check_choice, check_number

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "aim", "comet_ml", "dvclive", "swanlab")


def _number(
    default: Any, least: float, most: float | None = None, below: float = math.inf, harmless: bool = False
) -> Any:
    """A field with its bounds: at `most`, or `below`. An integer `least` means that the field is a count."""
    if most is None and below == math.inf:
        most = LARGEST if isinstance(least, int) else math.inf
    bounds = (least, below, False) if most is None else (least, most, True)
    return field(default=default, metadata={"bounds": bounds, "harmless": harmless})


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "initializer_range"),
    *("norm_eps", "dropout"),
)
"""Fields of `ModelConfig` that a model's Transformers config has, by this name or another."""
_HARMLESS = {"harmless": True}
"""Metadata of fields that change no result: a resumed run may have other values, and so may runs that are compared."""


@dataclass
class ModelConfig:
    """The model to train, in Transformers' names.

    Args:
        model_type: architecture: llama, gpt2, or another causal language model of Transformers by its model type, such
            as qwen3 or olmo2.
        init_from: directory or name of a checkpoint to start from, of such an architecture, stock or ours; its sizes
            and epsilon replace those given here, and its tokenizer is used unless another one is given.
        norm_type: norm at every site: ibnorm_s, ibnorm_l, ibnorm_t, ibnorm_shrink, layernormalnorm, layernorm, rmsnorm
            or dyt; or stock, the architecture's own (null, with init_from only: the norms of that checkpoint).
        norm_kwargs: options of the norm; where init_from has this norm already, the options to change. A whole {...}
            replaces the recipe's options, --model.norm_kwargs.lam 4 merges into it.
        norm_overrides: sites with another norm, a list of [glob, norm], such as '[[layers.0.*, dyt]]', or a mapping;
            norm is a name or {type: ..., kwargs: {...}}; the last match wins.
        vocab_size: rows of the embedding (null: the size of the tokenizer).
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: attention heads a block.
        num_key_value_heads: key and value heads, where they may be fewer (null: as many as attention heads).
        max_position_embeddings: longest context (null: block_size).
        tie_word_embeddings: share the embedding with the output layer.
        initializer_range: standard deviation of the initial matrices.
        norm_eps: the model's own epsilon (null: the architecture's, 1e-6 for llama, 1e-5 for gpt2).
        dropout: everywhere where the architecture has one: for llama that is in the attention.
        config_kwargs: other fields of the architecture's Transformers config, such as {head_dim: 64}; those left out
            are as that config has them. A whole {...} replaces the recipe's, --model.config_kwargs.head_dim 64 merges
            into it.
        dtype: of the weights, float32; for bfloat16 arithmetic see mixed_precision.
    """

    model_type: str = "llama"
    init_from: str | None = None
    norm_type: str | None = "ibnorm_l"
    norm_kwargs: dict[str, Any] = field(default_factory=dict)
    norm_overrides: list[Any] | dict[str, Any] = field(default_factory=list)
    vocab_size: int | None = _number(None, 1)
    hidden_size: int = _number(128, 1)
    intermediate_size: int = _number(384, 1)
    num_hidden_layers: int = _number(4, 1)
    num_attention_heads: int = _number(4, 1)
    num_key_value_heads: int | None = _number(None, 1)
    max_position_embeddings: int | None = _number(None, 1)
    tie_word_embeddings: bool = True
    initializer_range: float = _number(0.02, 0.0, 1.0)
    norm_eps: float | None = _number(None, 0.0)
    dropout: float = _number(0.0, 0.0, below=1.0)
    config_kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"


@dataclass
class TrainConfig:
    """One pretraining run.

    Args:
        run_dir: directory of the run, new or empty unless resume says otherwise.
        resume: no; auto (go on from the newest whole checkpoint in run_dir, to the bit, or from step 0 without any); or
            inexact (go on even where the machine or the software computes other bits by now).
        seed: of the initial weights, the data order and the noise.
        corpus: embedded corpus (austen, sotu); file, glob or folder of .txt, .jsonl or .parquet, also as .gz, .xz or
            .zst; or name of a dataset of the datasets library, on the Hub or saved to disk.
        corpus_config: configuration of a dataset, such as en for allenai/c4.
        train_split: split of a dataset to train on.
        validation_split: split of a dataset to validate on.
        validation_corpus: source of the validation text if the corpus has none (null: documents are held out).
        validation_every: hold out one document in so many, beginning with the first; not for streaming.
        text_field: field with the text in a line or row of the corpus, and of validation_corpus.
        streaming: read, shuffle and tokenize the corpus while training, instead of tokenizing it first.
        shuffle_buffer: streaming: documents among which the next one is drawn.
        tokenizer: directory or name of a tokenizer (null: a byte-level BPE is trained on the training split).
        tokenizer_vocab_size: tokens of the tokenizer that is trained (at least 257).
        tokenizer_documents: documents it is trained on (null: all; streaming: the first 10000).
        tokenizer_threads: threads that tokenize.
        add_bos: whether documents begin with the tokenizer's BOS token: true, false, or auto (where the tokenizer
            begins texts with it, as eval then does, and it is not the EOS token as well).
        max_bad_documents: documents of a pass that may be left out because they cannot be read, in a stream by each
            process; one more ends the run.
        cache_dir: folder that keeps tokens between runs (null: $HF_IBNORM_CACHE, or else ~/.cache/hf_ibnorm).
        block_size: tokens a sequence, at most the model's context.
        max_steps: optimizer steps.
        global_batch_size: sequences a step, over all devices (null: the next two times the number of devices).
        per_device_train_batch_size: sequences of a micro-batch on a device; with global_batch_size, at most.
        gradient_accumulation_steps: micro-batches in one step; with global_batch_size, as many as that takes.
        per_device_eval_batch_size: sequences of a batch on a device in validation.
        learning_rate: peak of the schedule.
        warmup_steps: linear warmup from 0, then a cosine.
        min_lr_rate: end of the cosine, as a fraction of the peak.
        weight_decay: of AdamW, on matrices only.
        adam_beta1: decay of AdamW's running mean of the gradient.
        adam_beta2: decay of AdamW's running mean of its square.
        adam_epsilon: added to the root of that mean.
        max_grad_norm: gradients are clipped to this norm (0: not at all).
        lam_schedule: strength of IBNorm: constant, or linear from no compression (lam 0, ibnorm_s: 1) to the value in
            norm_kwargs.
        lam_warmup_steps: steps of the linear schedule.
        trainable: all; norms (all other weights stay the same to the bit); or lora: norms, and LoRA adapters on linear
            layers, merged into every model that is saved.
        lora_rank: rank of an adapter.
        lora_alpha: an adapter's product is multiplied by this over its rank.
        lora_targets: names of the linear layers with an adapter, such as [q_proj, v_proj] (null: all in the blocks).
        teacher: directory or name of a causal language model, stock or ours, with the same tokenizer, whose logits are
            distilled (null: none).
        distillation_weight: w in loss = (1 - w) cross-entropy + w T^2 KL(teacher || student); with a teacher, not 0.
        distillation_temperature: T, by which both models' logits are divided in KL.
        mixed_precision: no, bf16 or fp16: autocast over float32 weights.
        compile: compile each block with torch.compile; the first step then takes a minute or more.
        gradient_checkpointing: keep only the input of each block, and compute its other activations again for the
            gradients: less memory, about a third more arithmetic, the same gradients.
        deterministic: on a GPU, use algorithms that give the same bits each time, where there are any; slower.
        eval_every: steps between two validations (the last step always has one).
        max_eval_blocks: blocks of the validation split that are used (null: all).
        checkpoint_every: steps between two checkpoints (0: only where a signal stops the run).
        keep_last: checkpoints kept, the newest ones; step 0 is always kept.
        keep_every: checkpoints at multiples of this step are kept too (0: none).
        max_skipped_steps: end the run after so many steps in a row without a finite loss and gradient, which are
            skipped; a run that has skipped a quarter of all its steps fails, too.
        watch_norms: steps between two records of the inputs and outputs of every norm in norms.jsonl, with a few of
            these numbers for the trackers; also at the first and the last step (0: never; not with compile).
        push_to_hub: repository on the Hub, NAMESPACE/NAME, for the finished model with a card, private (null: none).
        log_with: trackers besides metrics.jsonl: tensorboard, wandb, mlflow, trackio, aim, comet_ml, dvclive, swanlab.
        tracker_project: project, or experiment, of the run at these trackers, TensorBoard apart.
        progress_seconds: seconds between two lines of progress where the output is no terminal (0: only validations).
        ddp_timeout: seconds that a process waits for the others, however the run is spread: one machine may tokenize,
            or read a checkpoint, for longer than another.
        model: the model.
    """

    run_dir: str
    resume: Literal["no", "auto", "inexact"] = "no"
    seed: int = _number(0, 0, 2**31)
    corpus: str = "austen"
    corpus_config: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    validation_corpus: str | None = None
    validation_every: int = _number(100, 2)
    text_field: str = "text"
    streaming: bool = False
    shuffle_buffer: int = _number(10_000, 1)
    tokenizer: str | None = None
    tokenizer_vocab_size: int = _number(2048, 257)
    tokenizer_documents: int | None = _number(None, 1)
    tokenizer_threads: int = _number(2, 1, 1024, harmless=True)
    add_bos: bool | Literal["auto"] = "auto"
    max_bad_documents: int = _number(0, 0, harmless=True)
    cache_dir: str | None = field(default=None, metadata=_HARMLESS)
    block_size: int = _number(256, 2)
    max_steps: int = _number(400, 1)
    global_batch_size: int | None = _number(None, 1)
    per_device_train_batch_size: int = _number(8, 1)
    gradient_accumulation_steps: int = _number(1, 1)
    per_device_eval_batch_size: int = _number(8, 1)
    learning_rate: float = _number(1e-3, 0.0)
    warmup_steps: int = _number(40, 0)
    min_lr_rate: float = _number(0.1, 0.0, 1.0)
    weight_decay: float = _number(0.1, 0.0)
    adam_beta1: float = _number(0.9, 0.0, below=1.0)
    adam_beta2: float = _number(0.95, 0.0, below=1.0)
    adam_epsilon: float = _number(1e-8, 0.0)
    max_grad_norm: float = _number(1.0, 0.0)
    lam_schedule: Literal["constant", "linear"] = "constant"
    lam_warmup_steps: int = _number(0, 0)
    trainable: Literal["all", "norms", "lora"] = "all"
    lora_rank: int = _number(16, 1)
    lora_alpha: float = _number(32.0, 0.0)
    lora_targets: list[str] | None = None
    teacher: str | None = None
    distillation_weight: float = _number(0.5, 0.0, 1.0)
    distillation_temperature: float = _number(1.0, 0.0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    gradient_checkpointing: bool = False
    deterministic: bool = True
    eval_every: int = _number(100, 1)
    max_eval_blocks: int | None = _number(None, 1)
    checkpoint_every: int = _number(100, 0, harmless=True)
    keep_last: int = _number(2, 1, harmless=True)
    keep_every: int = _number(0, 0, harmless=True)
    max_skipped_steps: int = _number(10, 1, harmless=True)
    watch_norms: int = _number(0, 0, harmless=True)
    push_to_hub: str | None = field(default=None, metadata=_HARMLESS)
    log_with: list[str] = field(default_factory=lambda: ["tensorboard"], metadata=_HARMLESS)
    tracker_project: str = field(default="hf_ibnorm", metadata=_HARMLESS)
    progress_seconds: float = _number(60.0, 0.0, harmless=True)
    ddp_timeout: int = _number(7200, 1, 10**8, harmless=True)  # a timedelta can count no more nanoseconds
    model: ModelConfig = field(default_factory=ModelConfig)

    def validate(self) -> None:
        """Raise ValueError or TypeError, naming the field, the value and what is allowed, for a bad number or name."""
        checked: tuple[tuple[str, TrainConfig | ModelConfig], ...] = (("", self), ("model.", self.model))
        for prefix, settings in checked:
            for declared in fields(settings):
                value, bounds = getattr(settings, declared.name), declared.metadata.get("bounds")
                if bounds and (value is not None or declared.default is not None):
                    low, high, high_allowed = bounds
                    check_number(f"{prefix}{declared.name}", value, low, high, high_allowed=high_allowed)
        for name in self.log_with:
            check_choice("log_with", name, TRACKERS)
        if self.push_to_hub is not None:
            from .push import check_repo

            check_repo("push_to_hub", self.push_to_hub)
        for name, broken, rule in self._rules():
            if broken:
                value = operator.attrgetter(name)(self)
                shown = f"{value:g}" if isinstance(value, float) else "null" if value is None else repr(value)
                raise ValueError(f"{name}: got {shown}, {rule}")
        if self.model.init_from is None:  # otherwise the sizes are the checkpoint's
            self.check_context(self.model.max_position_embeddings)

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Rules that join several fields: the field that an error names, whether the rule is broken, and the rule."""
        model = self.model
        for name in ("warmup_steps", "lam_warmup_steps"):
            yield name, getattr(self, name) > self.max_steps, f"must be <= max_steps = {self.max_steps}"
        every = self.checkpoint_every
        no_multiple = bool(self.keep_every) and (not every or self.keep_every % every > 0)
        checkpoints = f"checkpoint_every = {every}, or there are no checkpoints at its steps to keep"
        yield "keep_every", no_multiple, f"must be a multiple of {checkpoints}"
        one_of_two = (self.lam_schedule == "linear") != bool(self.lam_warmup_steps)
        yield "lam_warmup_steps", one_of_two, "must be >= 1 with lam_schedule linear and 0 with constant"
        hooks = "because compiled blocks run no hooks; or set compile to false"
        yield "watch_norms", bool(self.watch_norms) and self.compile, f"must be 0 with compile true, {hooks}"
        no_start = self.trainable != "all" and model.init_from is None
        start = f"must be the directory or name of a checkpoint where trainable is {self.trainable}"
        yield "model.init_from", no_start, start
        for name in ("lora_alpha", "distillation_temperature"):
            yield name, not getattr(self, name), "must be > 0"
        yield "lora_targets", self.lora_targets == [], "must name a layer, or be null for all"
        useless = self.teacher is not None and not self.distillation_weight
        yield "distillation_weight", useless, "must be > 0 with a teacher; or set teacher to null"
        yield "tracker_project", not self.tracker_project.strip(), "must be a name"
        moves = "must be 'float32': in bfloat16 a gain near 1 never moves, its updates round away"
        instead = "for bfloat16 arithmetic over float32 weights set mixed_precision to bf16"
        yield "model.dtype", model.dtype != "float32", f"{moves}; {instead}"
        keeps, name = model.norm_type is None, "must be a norm's name"
        yield "model.norm_type", keeps and model.init_from is None, f"which keeps the norms of model.init_from; {name}"
        yield "model.norm_type", keeps and bool(model.norm_overrides), f"{name} where model.norm_overrides are given"
        for part, whole in (("num_attention_heads", "hidden_size"), ("num_key_value_heads", "num_attention_heads")):
            heads, divided = getattr(model, part), getattr(model, whole)
            uneven = model.init_from is None and heads is not None and divided % heads > 0
            yield f"model.{part}", uneven, f"must divide model.{whole} = {divided}"

    def check_context(self, context: int | None) -> None:
        """Raise ValueError where a block does not fit into a model's `context`."""
        if context is not None and self.block_size > context:
            raise ValueError(f"block_size: got {self.block_size}, must be <= model.max_position_embeddings = {context}")

    def spread_over(self, processes: int) -> "TrainConfig":
        """These settings with the step's sequences divided among so many processes.

        Without `global_batch_size` they stay as they are. With it the size of a micro-batch is the largest, up to
        `per_device_train_batch_size`, that divides a process's share. ValueError where shares cannot be equal.
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
        return {name: value for name, value in asdict(self).items() if name not in ("run_dir", "resume")}


def allow(field: str, value: object, allowed: list[Any], where: str = "", instead: str = "") -> None:
    """Raise UserError unless `value` is allowed; `where`, such as " with FSDP", and `instead` go into the message."""
    if value not in allowed:
        raise UserError(f"{field}: got {value}, allowed{where}: {', '.join(map(str, allowed))}{instead}")


def harmless_settings() -> list[str]:
    """Names of the settings that change no result."""
    return [declared.name for declared in fields(TrainConfig) if declared.metadata.get("harmless")]
