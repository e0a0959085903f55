"""Tokens to batches: packing, the order in which training reads, and the position in it.

A finite corpus is one array of tokens, and what step k reads is a function of the seed and of how much was read before:
its position is one number. A stream is read, shuffled and tokenized as training goes; its position is all that is in
flight between the reader and the last batch.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_ibnorm.cli import UserError
from hf_ibnorm.files import sha256

from .cache import take_chunk
from .corpus import Documents
from .tokenizer import encode

IGNORE = -100
"""Target of a position that counts in no loss, as in torch's cross entropy."""
BUFFER_CHARACTERS = 1 << 26
"""What a shuffle buffer holds at most: checkpoints hold it too."""


@dataclass(frozen=True)
class Layout:
    """How a step's sequences are dealt out.

    Args:
        per_device: sequences a process takes at a time.
        micro_batches: such batches a process takes in one step.
        processes: number of processes.
        process: which of them this is.
    """

    per_device: int
    micro_batches: int
    processes: int = 1
    process: int = 0

    @property
    def sequences(self) -> int:
        """Sequences of one step, over all processes."""
        return self.per_device * self.micro_batches * self.processes


@dataclass(frozen=True)
class Batch:
    """What this process trains on in one step.

    Args:
        parts: inputs and targets, int64 of shape (per_device, block_size), for each micro-batch.
        tokens: targets that count, over all processes.
        sha: hash of the data, of all processes or of this one (`shared_sha` of the data set says which).
    """

    parts: list[tuple[Tensor, Tensor]]
    tokens: int
    sha: str

    @classmethod
    def of_nothing(cls, layout: Layout) -> "Batch":
        """For a process that cannot go on, while the others need it to take its part in the step."""
        inputs = torch.zeros((layout.per_device, 1), dtype=torch.int64)
        return cls([(inputs, torch.full_like(inputs, IGNORE))] * layout.micro_batches, 1, "0")


class PackedTokens:
    """One stream of tokens, each document followed by the end-of-text token, cut into blocks.

    Block i has inputs stream[i·B : (i+1)·B] and as targets the same shifted by one, so that every token but the very
    first is predicted exactly once. The last block is filled up with positions that count in no loss.

    Args:
        stream: token ids, integers of shape (n,), n at least 2; may be memory-mapped.
        eos: the end-of-text token.
        block_size: B, tokens a block.
        max_blocks: leave out the blocks after so many.

    Raises:
        UserError: there is nothing to predict.
    """

    def __init__(self, stream: np.ndarray, eos: int, block_size: int, max_blocks: int | None = None) -> None:
        if len(stream) < 2:
            raise UserError("corpus: its training or validation split has no text")
        if max_blocks is not None:
            stream = stream[: max_blocks * block_size + 1]
        self.stream, self.eos, self.block_size = stream, eos, block_size
        self.targets = len(stream) - 1
        """Tokens predicted in one pass over all blocks."""
        self.blocks = -(-self.targets // block_size)
        self.padding = self.blocks * block_size - self.targets
        """Positions of the last block that count in no loss."""

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 of shape (len(indices), B), of the blocks `indices`; past the last one all is
        padding."""
        places = np.asarray(indices)[:, None] * self.block_size + np.arange(self.block_size + 1)
        tokens = self.stream[np.minimum(places, self.targets)].astype(np.int64)
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        past = places[:, 1:] > self.targets
        inputs[past], targets[past] = self.eos, IGNORE
        return torch.from_numpy(inputs), torch.from_numpy(targets)


class BlockOrder:
    """The endless order in which training reads blocks: each epoch a fresh permutation, drawn from (seed, epoch).

    A step reads the next `size` places whatever the number of processes and accumulation steps, so all of them see
    the same global batches; an epoch may end inside a batch, and no block is left out.
    """

    def __init__(self, blocks: int, seed: int) -> None:
        self.blocks, self.seed = blocks, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, start: int, size: int) -> np.ndarray:
        """Block indices at places start … start+size-1 of the order."""
        return np.array([self._at(place) for place in range(start, start + size)])

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self.blocks)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.blocks)
        return int(self._order[offset])


def split_batch(indices: np.ndarray, layout: Layout) -> Iterator[np.ndarray]:
    """This process's part of the `indices` of a global batch, one array for each micro-batch."""
    for part in indices.reshape(layout.micro_batches, layout.processes, -1):
        yield part[layout.process]


def _pinned(tensor: Tensor) -> Tensor:
    """`tensor` where a GPU can fetch it while the program goes on."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _sha(inputs: Tensor, targets: Tensor) -> str:
    return sha256([inputs.numpy().tobytes(), targets.numpy().tobytes()])[:16]


class PackedData:
    """A finite corpus, read in an order that depends on the seed alone.

    While a step computes, a thread makes the batch of the next one: reads it from disk, cuts and hashes it.
    """

    shared_sha = True

    def __init__(self, packed: PackedTokens, seed: int, layout: Layout) -> None:
        self.packed, self.layout = packed, layout
        self._order = BlockOrder(packed.blocks, seed)
        self._place = 0
        self._thread = ThreadPoolExecutor(1)
        self._ahead: Future[Batch] | None = None

    def next(self) -> Batch:
        """The next step's batch."""
        batch = (self._ahead or self._thread.submit(self._make, self._place)).result()
        self._place += self.layout.sequences
        self._ahead = self._thread.submit(self._make, self._place)
        return batch

    def _make(self, place: int) -> Batch:
        """The batch that begins at `place` of the order."""
        indices = self._order.take(place, self.layout.sequences)
        inputs, targets = self.packed.batch(indices)
        mine = split_batch(np.arange(len(indices)), self.layout)
        parts = [(_pinned(inputs[rows]), _pinned(targets[rows])) for rows in mine]
        return Batch(parts, int((targets != IGNORE).sum()), _sha(inputs, targets))

    def state(self) -> dict[str, Any]:
        """Where the next batch begins: equal on every process, and for every number of them."""
        return {"place": self._place}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Only before the first batch."""
        self._place = state["place"]

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


class StreamedData:
    """An endless stream of documents: each process reads its part, shuffles it in a buffer, tokenizes and packs it.

    A pass over the part gives every document once: the buffer is emptied before the next pass begins. Reading and
    tokenizing happen in threads ahead of training. The `datasets` library can say where its reader stands but forgets
    what was shuffled; so the state holds the buffer too, taken as of the last document that training has met.

    Args:
        documents: the source.
        tokenizer: a fast tokenizer with an end-of-text token.
        block_size: tokens a sequence.
        seed: of the shuffling.
        buffer: documents among which the next one is drawn; 1 for the order of the source.
        threads: that tokenize side by side.
        layout: what this process takes of a step.
    """

    shared_sha = False

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerFast,
        block_size: int,
        seed: int,
        buffer: int,
        threads: int,
        layout: Layout,
    ) -> None:
        self.documents, self.tokenizer, self.layout = documents, tokenizer, layout
        self.block_size, self.seed, self.buffer_size = block_size, seed, buffer
        self._start(epoch=0)
        self._rng = np.random.default_rng((seed, layout.process))
        self._buffer: list[str] = []
        self._characters = 0
        self._tokens = np.array([tokenizer.eos_token_id], dtype=np.uint32)  # the first token needs an input as well
        self._position = self._snapshot()
        # One thread reads, so that the order of documents is that of the source; several tokenize.
        self._reader, self._encoders = ThreadPoolExecutor(1), ThreadPoolExecutor(threads)
        self._ahead: deque[Future[tuple[Future[np.ndarray], dict[str, Any]]]] = deque()
        self._depth = 2 * threads

    def next(self) -> Batch:
        """The next step's batch.

        Raises:
            UserError: this process's part has no documents, or one of them cannot be read.
        """
        layout, size = self.layout, self.block_size
        sequences = layout.per_device * layout.micro_batches
        needed = sequences * size + 1
        chunks, have = [self._tokens], len(self._tokens)
        while have < needed:
            while len(self._ahead) < self._depth:
                self._ahead.append(self._reader.submit(self._read))
            encoding, self._position = self._ahead.popleft().result()
            chunks.append(encoding.result())
            have += len(chunks[-1])
        tokens = np.concatenate(chunks)
        self._tokens = tokens[needed - 1 :]  # the last target is the next input
        block = torch.from_numpy(tokens[:needed].astype(np.int64))
        inputs, targets = block[:-1].view(sequences, size), block[1:].view(sequences, size)
        split = (_pinned(each).split(layout.per_device) for each in (inputs, targets))
        parts = list(zip(*split, strict=True))
        return Batch(parts, layout.sequences * size, _sha(inputs, targets))

    def state(self) -> dict[str, Any]:
        """Where this process's next batch begins, as JSON can hold it."""
        return {**self._position, "tokens": self._tokens.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Only before the first batch."""
        self._start(state["epoch"])
        self._dataset.load_state_dict(state["reader"])
        self._iterator = self.documents.rows(self._dataset)
        self._ended, self._met = state["ended"], state["met"]
        self._rng.bit_generator.state = state["rng"]
        self._buffer = list(state["buffer"])
        self._characters = sum(map(len, self._buffer))
        self._tokens = np.array(state["tokens"], dtype=np.uint32)
        # Not a new snapshot: a reader says where it stands only once it has read.
        self._position = {name: state[name] for name in self._position}

    def close(self) -> None:
        """End the threads."""
        for pool in (self._reader, self._encoders):
            pool.shutdown(cancel_futures=True)

    def _start(self, epoch: int) -> None:
        """Begin a pass over the source."""
        self._epoch, self._ended, self._met = epoch, False, False
        self._dataset = self.documents.stream(self.layout.process, self.layout.processes, (self.seed, epoch))
        self._iterator = self.documents.rows(self._dataset)

    def _read(self) -> tuple[Future[np.ndarray], dict[str, Any]]:
        texts = take_chunk(iter(self._draw, None))
        return self._encoders.submit(encode, self.tokenizer, texts), self._snapshot()

    def _snapshot(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "reader": self._dataset.state_dict(),
            "ended": self._ended,
            "met": self._met,
            "rng": self._rng.bit_generator.state,
            "buffer": list(self._buffer),
        }

    def _draw(self) -> str:
        """The next document: a random one of the buffer, which is filled up first."""
        while True:
            while not self._ended and len(self._buffer) < self.buffer_size and self._characters < BUFFER_CHARACTERS:
                row = next(self._iterator, None)
                if row is None:
                    self._ended = True
                else:
                    self._met = True
                    self._buffer.append(self.documents.text(row))
                    self._characters += len(self._buffer[-1])
            if self._buffer:
                i = int(self._rng.integers(len(self._buffer)))
                self._buffer[i], self._buffer[-1] = self._buffer[-1], self._buffer[i]
                self._characters -= len(self._buffer[-1])
                return self._buffer.pop()
            if not self._met:
                raise UserError(
                    f"corpus: process {self.layout.process} of {self.layout.processes} gets no document of it"
                )
            self._start(self._epoch + 1)
