"""The language task: text as batches of tokens, the loss of a batch, and the mean loss over the validation text."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_ibnorm.base import layout
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import sha256, sha256_tensors
from hf_ibnorm.base.room import check_model, check_room
from hf_ibnorm.data.tokens import Encoder

from ..architecture import build_model_config, resolved
from ..cache import Cache, encode_all
from ..checkpoint import skeleton_of
from ..corpus import CorpusOptions, Documents, HeldOut, open_corpus, overlap
from ..data import IGNORE, PackedData, PackedTokens, StepShape, StreamedData
from ..distribution import reshard
from ..flops import flops_per_token
from ..model import load_teacher, make_model, read_config, starting_config
from ..progress import with_progress
from ..settings import TrainConfig
from ..start import Start
from ..tokenizer import load_tokenizer, saved_and_loaded, train_tokenizer, wrap_tokenizer
from . import Task

STREAMED_TOKENIZER_DOCUMENTS = 10_000
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TOKEN = 4 * 8  # bytes of a token of a step: input and target as 64-bit numbers, of this step and of the next
_COMPUTED = 2 * 257
"""Bytes of a token that a model computes at a time: its logits for the smallest vocabulary, in 16 bits."""
_ENTRY = 100  # bytes of an entry of a tokenizer's vocabulary, at least


@dataclass
class LanguageTask(Task):
    """Next-token prediction; parts of a batch are int64 of shape (batch, block_size), losses are in nats."""

    config: TrainConfig
    accelerator: Accelerator
    cache: Cache
    texts: dict[str, Documents]  # "train" and "validation"
    processor: PreTrainedTokenizerFast
    encoder: Encoder
    teacher: PreTrainedModel | None = None  # in float32 and eval mode, without gradients, whole on each process
    batches: PackedData | StreamedData = field(init=False)
    validation: PackedTokens = field(init=False)

    def make_model(self, start: Start) -> tuple[PreTrainedModel, Any]:
        model, model_config = make_model(self.config, self.processor, start)
        self.config = resolved(self.config, model_config)
        if self.config.teacher is not None:
            with bad_input():
                teacher: Any = load_teacher(self.config, self.config.teacher, self.processor)
            self.teacher = teacher.to(self.accelerator.device)
        return model, model_config

    def hashes(self) -> dict[str, str | None]:
        hashes = {
            "tokenizer_sha": sha256(self.encoder.key),
            "train_sha": self.texts["train"].fingerprint,
            "validation_sha": self.texts["validation"].fingerprint,
        }
        if self.teacher is not None:
            hashes["teacher_sha"] = sha256_tensors(self.teacher.named_parameters())
        return hashes

    def read_data(self) -> None:
        """Tokenize the text, or find its tokens in the cache, and cut it into batches."""
        config, eos, train = self.config, self.processor.eos_token_id, self.texts["train"]
        size, threads = config.block_size, config.tokenizer_threads
        shape = StepShape(
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            self.accelerator.num_processes,
            self.accelerator.process_index,
        )
        if config.streaming:
            buffer = config.shuffle_buffer
            self.batches = StreamedData(train, self.encoder, size, config.seed, buffer, threads, shape)
        else:
            assert train.fingerprint is not None, "only streams have none"
            packed = PackedTokens(self.cache.tokens(train.fingerprint, self.encoder, train, threads), eos, size)
            self.batches = PackedData(packed, config.seed, shape, train.bad["count"])
        tokens = self._validation_tokens()
        for split, documents in self.texts.items():
            if count := documents.bad["count"]:
                first = documents.bad["first"]
                warning = f"WARNING: corpus, {split}: left out because they cannot be read: {count}; the first: {first}"
                self.cache.say(warning)
        self.validation = PackedTokens(tokens, eos, size, config.max_eval_blocks)

    def _validation_tokens(self) -> np.ndarray:
        """The validation split as tokens, from the cache where its text has a hash."""
        config, documents = self.config, self.texts["validation"]
        if documents.fingerprint is not None:
            return self.cache.tokens(documents.fingerprint, self.encoder, documents, config.tokenizer_threads)
        wanted = np.inf if config.max_eval_blocks is None else config.max_eval_blocks * config.block_size + 1
        chunks, length = [], 0
        for ids in encode_all(self.encoder, documents, config.tokenizer_threads):
            chunks.append(ids)
            length += len(ids)
            if length >= wanted:
                break
        if not chunks:
            raise UserError("validation_split: it has no document")
        return np.concatenate(chunks)

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"validation_tokens": self.validation.targets, "bos_token_id": self.encoder.bos}
        if isinstance(self.batches, PackedData):
            packed = self.batches.packed
            record |= {"train_tokens": packed.targets, "train_blocks": packed.blocks, "train_padding": packed.padding}
        return record

    def summary(self) -> str:
        tokens = "a stream"
        if isinstance(self.batches, PackedData):
            tokens = f"{self.batches.packed.targets:,} training tokens"
        step = self.batches.shape.sequences * self.config.block_size
        return f"{tokens} of {self.config.corpus}, {self.config.max_steps:,} steps of {step:,}"

    def flops_per_token(self, skeleton: PreTrainedModel) -> float | None:
        teacher = None if self.teacher is None else skeleton_of(self.teacher)
        return flops_per_token(skeleton, self.config.block_size, teacher)

    def blank_part(self) -> tuple[Tensor, Tensor]:
        shape = (self.config.per_device_train_batch_size, self.config.block_size)
        tokens = torch.zeros(shape, dtype=torch.int64, device=self.accelerator.device)
        return tokens, tokens

    def loss(self, model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        return training_loss(model, self.teacher, self.config, *part)

    def evaluate(self, model: nn.Module, asked_to_stop: Callable[[], bool]) -> float | None:
        return evaluate(model, self.validation, self.config, self.accelerator, asked_to_stop)


def open_task(config: TrainConfig, start: Start, accelerator: Accelerator, say: Callable[[str], None]) -> LanguageTask:
    """The text of a run, opened and not read yet, and its tokenizer, which may be trained now.

    `say` gets a line about whatever takes long, and about text that is left out. UserError where the machine cannot
    hold a step, the model cannot be built, or there is no such text or tokenizer.
    """
    check_sizes(config, accelerator.num_processes)
    with bad_input():
        if config.model.init_from is None:
            check_model("model", build_model_config(config))
        elif start.checkpoint is None:
            starting_config(config, config.model.init_from, None)
        if config.teacher is not None:
            read_config("teacher", config.teacher)
    cache = Cache(config.cache_dir, say)
    texts = open_texts(config, cache)
    if start.checkpoint is not None:
        tokenizer = load_tokenizer("run_dir", start.checkpoint.path / layout.MODEL)
    else:
        tokenizer = saved_and_loaded(_new_tokenizer(config, cache, texts["train"]))
    with bad_input():
        return LanguageTask(config, accelerator, cache, texts, tokenizer, Encoder(tokenizer, config.add_bos))


def check_sizes(config: TrainConfig, processes: int) -> None:
    """Refuse, before any text is read, a step that this machine cannot hold."""
    block, micro_batches = config.block_size, config.gradient_accumulation_steps
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        sequences = getattr(config, name)
        check_room(name, sequences, sequences * block * _COMPUTED, f"for logits of so many sequences of {block} tokens")
    step = config.per_device_train_batch_size * micro_batches * processes * block
    check_room("gradient_accumulation_steps", micro_batches, step * _TOKEN, "for the tokens of a step")
    check_room("tokenizer_vocab_size", config.tokenizer_vocab_size, _ENTRY * config.tokenizer_vocab_size, "for tokens")
    if config.trainable == "lora":
        adapters = 2 * 4 * config.lora_rank * config.model.hidden_size * config.model.num_hidden_layers
        check_room("lora_rank", config.lora_rank, adapters, "for adapters")


def open_texts(config: TrainConfig, cache: Cache) -> dict[str, Documents]:
    """The documents of the training and the validation split."""
    options = CorpusOptions(
        config.corpus_config,
        config.text_field,
        config.streaming,
        cache.file_sha,
        config.max_bad_documents,
        cache.say,
    )
    train = open_corpus(config.corpus, "train", config.train_split, options)
    assert train is not None
    if (name := config.validation_corpus) is not None:
        try:
            validation = open_corpus(name, "alone", config.validation_split, options)
            validation = validation or open_corpus(name, "train", config.train_split, options)
        except UserError as error:
            raise type(error)(re.sub("^(?=corpus: )", "validation_", str(error))) from error
        assert validation is not None
        if both := overlap(train, validation):
            cache.say(f"WARNING: validation_corpus: {both} is training text, too; the loss on it is no validation loss")
        return {"train": train, "validation": validation}
    if validation := open_corpus(config.corpus, "validation", config.validation_split, options):
        return {"train": train, "validation": validation}
    if config.streaming:
        raise UserError(
            f"validation_corpus: got null, and {config.corpus} has no split {config.validation_split!r}; name files or "
            "a dataset to validate on (only without streaming are documents held out)"
        )
    return {part: HeldOut(train, config.validation_every, rest=part == "train") for part in ("train", "validation")}


def _new_tokenizer(config: TrainConfig, cache: Cache, documents: Documents) -> PreTrainedTokenizerFast:
    """The tokenizer that the settings name, or one trained on `documents`."""
    if config.tokenizer is not None:
        return load_tokenizer("tokenizer", config.tokenizer)
    if config.model.init_from is not None:
        return load_tokenizer("model.init_from", config.model.init_from)
    limit = config.tokenizer_documents or (STREAMED_TOKENIZER_DOCUMENTS if config.streaming else None)

    def trained() -> str:
        texts = with_progress(islice(documents, limit), cache.say, "training a tokenizer")
        text = train_tokenizer(texts, config.tokenizer_vocab_size)
        documents.confirm()
        return text

    if documents.fingerprint is None:
        text = trained()
    else:
        text = cache.text("tokenizer", [documents.fingerprint, str(config.tokenizer_vocab_size), str(limit)], trained)
    return wrap_tokenizer(text, config.model.max_position_embeddings or config.block_size)


def training_loss(
    student: nn.Module, teacher: PreTrainedModel | None, config: TrainConfig, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The loss to minimize, and the divergence from a teacher in it, neither weighted nor scaled; None without one.

    Both are sums over the targets that count. The teacher's logits are distilled (arXiv 1503.02531) beside the text.
    """
    if teacher is None:
        return token_loss(student, inputs, targets), None
    logits = student(input_ids=inputs, use_cache=False).logits
    weight, temperature = config.distillation_weight, config.distillation_temperature
    # The teacher's logits have no name here: in the loss they take memory only as long as it needs them.
    return distillation_loss(logits, _taught(teacher, config, inputs), targets, weight, temperature)


@torch.no_grad()
def _taught(teacher: PreTrainedModel, config: TrainConfig, inputs: Tensor) -> Tensor:
    """The teacher's logits, computed in the student's precision."""
    low = LOW.get(config.mixed_precision)
    with torch.autocast(inputs.device.type, low, enabled=low is not None):
        return teacher(input_ids=inputs, use_cache=False).logits


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods, in nats, of the targets that count."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: PackedTokens,
    config: TrainConfig,
    accelerator: Accelerator,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss in nats over every token of a whole split, in eval mode: dropout and noise norms are quiet.

    Every process takes equally many batches, some of padding: where the model is sharded, all must run it together.
    None where a process was asked to stop meanwhile. RuntimeError where a part of the model stays in training mode.
    """
    model.eval()
    if loud := [name for name, module in accelerator.unwrap_model(model).named_modules() if module.training]:
        raise RuntimeError(f"{', '.join(loud)}: still in training mode, the loss would be that of a noisy model")
    size = config.per_device_eval_batch_size
    total = torch.zeros((), dtype=torch.float64)
    processes = accelerator.num_processes
    share = np.arange(accelerator.process_index, -(-data.blocks // processes) * processes, processes)
    for start in range(0, len(share), size):
        if accelerator.gather(torch.tensor([asked_to_stop()], device=accelerator.device)).any():
            reshard(model)  # or the snapshot that follows would miss the parts of the optimizer's state
            return None
        batch = data.batch(share[start : start + size])
        inputs, targets = (tensor.to(accelerator.device) for tensor in batch)
        total += token_loss(model, inputs, targets).double().cpu()
    reshard(model)
    summed = accelerator.reduce(total.to(accelerator.device), "sum")
    return summed.item() / data.targets


def distillation_loss(
    logits: Tensor, taught: Tensor, targets: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """(1 - weight) · cross-entropy + weight · T² · KL(teacher ‖ student), and that KL, in nats.

    KL is taken between both distributions at temperature T > 0; T² keeps its gradient as large whatever T is.

    Args:
        logits: the student's, (batch, length, vocabulary).
        taught: the teacher's, of the same shape, without gradients.
        targets: ids of the next tokens, (batch, length); `IGNORE` counts in neither term.

    Returns:
        Two scalars in float32, sums over the targets that count; the second without gradients.
    """
    logits, targets = logits.float().flatten(0, 1), targets.flatten()
    text = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    # Each tensor of tokens times vocabulary counts: the teacher's logits are let go of, and there is no product to sum.
    taught = F.log_softmax(taught.float().flatten(0, 1) / temperature, -1)
    difference = taught - F.log_softmax(logits / temperature, -1)
    divergence = torch.linalg.vecdot(taught.exp_(), difference)
    divergence = divergence.masked_fill(targets == IGNORE, 0.0).sum()
    return (1 - weight) * text + weight * temperature**2 * divergence, divergence.detach()
