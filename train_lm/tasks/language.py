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

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import sha256
from hf_ibnorm.data.tokens import Encoder

from ..cache import Cache, encode_all
from ..checkpoint import Checkpoint
from ..corpus import CorpusOptions, Documents, HeldOut, open_corpus, overlap
from ..data import IGNORE, Layout, PackedData, PackedTokens, StreamedData
from ..distribution import reshard
from ..progress import ReadingProgress
from ..settings import TrainConfig
from ..tokenizer import load_tokenizer, saved_and_loaded, train_tokenizer, wrap_tokenizer

STREAMED_TOKENIZER_DOCUMENTS = 10_000
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A model whose logits are distilled (arXiv 1503.02531), beside the text; it draws no random numbers."""

    model: PreTrainedModel  # in float32 and eval mode, without gradients, whole on each process
    config: TrainConfig

    def loss(self, student: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to minimize, and the divergence in it, neither weighted nor scaled: sums over targets that count."""
        logits = student(input_ids=inputs, use_cache=False).logits
        weight, temperature = self.config.distillation_weight, self.config.distillation_temperature
        return distillation_loss(logits, self.logits(inputs), targets, weight, temperature)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """The teacher's, in the arithmetic that the student has."""
        low = LOW.get(self.config.mixed_precision)
        with torch.autocast(inputs.device.type, low, enabled=low is not None):
            logits: Tensor = self.model(input_ids=inputs, use_cache=False).logits
        return logits


@dataclass
class LanguageTask:
    """Batches of text and what to do with them.

    `open_task` opens the text and makes the tokenizer, which the model waits for; `read_text` makes the batches.
    """

    config: TrainConfig
    cache: Cache
    texts: dict[str, Documents]  # to train and to validate on
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    teacher: Teacher | None = None
    batches: PackedData | StreamedData = field(init=False)  # what the loop takes a step's `Batch` from
    validation: PackedTokens = field(init=False)

    @property
    def hashes(self) -> dict[str, str | None]:
        """Hashes of all that decides the batches; None for a stream's text, which nothing has read yet."""
        texts = {f"{split}_sha": documents.fingerprint for split, documents in self.texts.items()}
        return {"tokenizer_sha": sha256(self.encoder.key), **texts}

    def read_text(self, accelerator: Accelerator) -> None:
        """Tokenize the text, or find its tokens in the cache, and cut it into batches.

        Raises:
            UserError: there is no text, or it cannot be read.
        """
        config, eos, train = self.config, self.tokenizer.eos_token_id, self.texts["train"]
        size, threads = config.block_size, config.tokenizer_threads
        layout = Layout(
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
        )
        if config.streaming:
            buffer = config.shuffle_buffer
            self.batches = StreamedData(train, self.encoder, size, config.seed, buffer, threads, layout)
        else:
            assert train.fingerprint is not None, "only streams have none"
            packed = PackedTokens(self.cache.tokens(train.fingerprint, self.encoder, train, threads), eos, size)
            self.batches = PackedData(packed, config.seed, layout, train.bad["count"])
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
        wanted = None if config.max_eval_blocks is None else config.max_eval_blocks * config.block_size + 1
        chunks, have = [], 0
        for ids in encode_all(self.encoder, documents, config.tokenizer_threads):
            chunks.append(ids)
            have += len(ids)
            if wanted is not None and have >= wanted:
                break
        if not chunks:
            raise UserError("validation_split: it has no document")
        return np.concatenate(chunks)

    @property
    def record(self) -> dict[str, Any]:
        """The entries of `environment.json` about the text."""
        record: dict[str, Any] = {"validation_tokens": self.validation.targets, "bos_token_id": self.encoder.bos}
        if isinstance(self.batches, PackedData):
            packed = self.batches.packed
            record |= {"train_tokens": packed.targets, "train_blocks": packed.blocks, "train_padding": packed.padding}
        return record

    def describe(self) -> str:
        """The training text and the steps on it, in a few words."""
        packed = self.batches.packed if isinstance(self.batches, PackedData) else None
        tokens = f"{packed.targets:,} training tokens" if packed else "a stream"
        step = self.batches.layout.sequences * self.config.block_size
        return f"{tokens} of {self.config.corpus}, {self.config.max_steps:,} steps of {step:,}"

    def blank_part(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets in the shape of a micro-batch, all of them token 0."""
        shape = (self.config.per_device_train_batch_size, self.config.block_size)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        return tokens, tokens

    def loss(self, model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The loss to minimize, and the teacher's divergence in it (None without one): sums over targets that count.

        Args:
            model: in training mode.
            part: inputs and targets of a micro-batch, int64 of shape (batch, block_size), on the model's device.
        """
        if self.teacher is None:
            return token_loss(model, *part), None
        return self.teacher.loss(model, *part)

    def evaluate(self, model: nn.Module, accelerator: Accelerator, asked_to_stop: Callable[[], bool]) -> float | None:
        """Mean loss in nats over the validation text, as `evaluate` gives it."""
        return evaluate(model, self.validation, self.config, accelerator, asked_to_stop)


def open_task(config: TrainConfig, checkpoint: Checkpoint | None, say: Callable[[str], None]) -> LanguageTask:
    """The text of a run, opened and not read yet, and its tokenizer, which may be trained now.

    Raises:
        UserError: a text or a tokenizer cannot be had.
    """
    cache = Cache(config.cache_dir, say)
    texts = open_texts(config, cache)
    if checkpoint is not None:
        tokenizer = load_tokenizer("run_dir", checkpoint.path / "model")
    else:
        tokenizer = saved_and_loaded(_new_tokenizer(config, cache, texts["train"]))
    with bad_input():
        return LanguageTask(config, cache, texts, tokenizer, Encoder(tokenizer, config.add_bos))


def open_texts(config: TrainConfig, cache: Cache) -> dict[str, Documents]:
    """The documents of the training and the validation split."""
    options = CorpusOptions(
        *(config.corpus_config, config.text_field, config.streaming, cache.file_sha),
        *(config.max_bad_documents, cache.say),
    )
    train = open_corpus(config.corpus, "train", config.train_split, options)
    assert train is not None
    if (name := config.validation_corpus) is not None:
        try:
            validation = open_corpus(name, "alone", config.validation_split, options) or open_corpus(
                name, "train", config.train_split, options
            )
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
    """The tokenizer that is asked for, or one trained on `documents`."""
    if config.tokenizer is not None:
        return load_tokenizer("tokenizer", config.tokenizer)
    if config.model.init_from is not None:
        return load_tokenizer("model.init_from", config.model.init_from)
    limit = config.tokenizer_documents or (STREAMED_TOKENIZER_DOCUMENTS if config.streaming else None)

    def trained() -> str:
        progress = ReadingProgress(cache.say, "training a tokenizer")
        text = train_tokenizer(progress.each(islice(documents, limit)), config.tokenizer_vocab_size)
        documents.confirm()
        return text

    if documents.fingerprint is None:
        text = trained()
    else:
        text = cache.text("tokenizer", [documents.fingerprint, str(config.tokenizer_vocab_size), str(limit)], trained)
    return wrap_tokenizer(text, config.model.max_position_embeddings or config.block_size)


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
    None where a process was asked to stop meanwhile.

    Raises:
        RuntimeError: a part of the model stays in training mode.
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
            reshard(model)  # or the snapshot that follows would miss what the optimizer knows by its parts
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

    KL is taken between both distributions at temperature T; T² keeps its gradient as large whatever T is.

    Args:
        logits: the student's, (batch, length, vocabulary).
        taught: the teacher's, of the same shape, without gradients.
        targets: ids of the next tokens, (batch, length); those that are `IGNORE` count in neither term.
        weight: in [0, 1].
        temperature: T > 0.

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
