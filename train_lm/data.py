"""Tokens to batches: packing, the order in which training reads, and the position in it.

A finite corpus is one array of tokens, and what step k reads is a function of the seed and of how much was read before:
its position is one number. A stream is read, shuffled and tokenized as training goes; its position is all that is in
flight between the reader and the last batch.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ibnorm.base.errors import TryAgain, UserError
from hf_ibnorm.base.files import sha256
from hf_ibnorm.data.files import WAITS, BadDocument, wait_or_raise
from hf_ibnorm.data.tokens import Encoder

from .cache import take_chunk, too_many
from .corpus import Documents

IGNORE = -100  # target of a position that counts in no loss, as in torch's cross entropy
BUFFER_CHARACTERS = 1 << 26  # what a shuffle buffer holds at most: checkpoints hold it too


@dataclass(frozen=True)
class Layout:
    """How a step's sequences are dealt out."""

    per_device: int  # sequences a process takes at a time
    micro_batches: int  # such batches a process takes in one step
    processes: int = 1
    process: int = 0  # which of them this is

    @property
    def sequences(self) -> int:
        """Sequences of one step, over all processes."""
        return self.per_device * self.micro_batches * self.processes


@dataclass(frozen=True)
class Batch:
    """The part of a step's data that this process trains on."""

    parts: list[tuple[Tensor, Tensor]]  # of each micro-batch, inputs and targets: int64 (per_device, block_size)
    tokens: int  # targets that count, over all processes
    sha: str  # hash of the data, of all processes or of this one (`shared_sha` of the data set says which)
    bad: int = 0  # documents that this process has left out so far, because they cannot be read


class PackedTokens:
    """One stream of tokens, each document followed by the end-of-text token `eos`, cut into blocks of size B.

    Block i has inputs stream[i·B : (i+1)·B] and as targets the same shifted by one, so that every token but the very
    first is predicted exactly once. The last block is filled up with positions that count in no loss. The stream is a
    vector of integers, which may be memory-mapped; UserError where it has nothing to predict.
    """

    def __init__(self, stream: np.ndarray, eos: int, block_size: int, max_blocks: int | None = None) -> None:
        if len(stream) < 2:
            raise UserError("corpus: its training or validation split has no text")
        if max_blocks is not None:
            stream = stream[: max_blocks * block_size + 1]
        self.stream, self.eos, self.block_size = stream, eos, block_size
        self.targets = len(stream) - 1  # tokens predicted in one pass over all blocks
        self.blocks = -(-self.targets // block_size)
        self.padding = self.blocks * block_size - self.targets  # positions of the last block that count in no loss

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
    """A finite corpus, read in an order that depends on the seed alone; `bad` documents were left out of it.

    While a step computes, a thread makes the batch of the next one: reads it from disk, cuts and hashes it.
    """

    shared_sha = True

    def __init__(self, packed: PackedTokens, seed: int, layout: Layout, bad: int = 0) -> None:
        self.packed, self.layout = packed, layout
        self._bad = 0 if layout.process else bad  # each process has left out the same
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
        return Batch(parts, int((targets != IGNORE).sum()), _sha(inputs, targets), self._bad)

    def trouble(self, stop: Callable[[], bool] = lambda: False) -> UserError | None:
        """Why there will be no next batch: here there always is one."""
        return None

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
    tokenizing happen in threads ahead of training, and so is the next batch made, so that what keeps it from being made
    is known in time: `trouble` says it while the state is still one to go on from. The `datasets` library can say where
    its reader stands but forgets what was shuffled; so the state holds the buffer too, taken as of the last document
    that training has met.

    `buffer` is the number of documents among which the next one is drawn, 1 for the order of the source; `threads`
    tokenize side by side.
    """

    shared_sha = False

    def __init__(
        self,
        documents: Documents,
        encoder: Encoder,
        block_size: int,
        seed: int,
        buffer: int,
        threads: int,
        layout: Layout,
    ) -> None:
        self.documents, self.encoder, self.layout = documents, encoder, layout
        self.block_size, self.seed, self.buffer_size = block_size, seed, buffer
        self._bad = 0
        self._start(epoch=0)
        self._rng = np.random.default_rng((seed, layout.process))
        self._buffer: list[str] = []
        self._characters = 0
        self._tokens = np.array([encoder.eos], dtype=np.uint32)  # the first token needs an input as well
        self._position = self._snapshot()
        # One thread reads, so that the order of documents is that of the source; several tokenize; one makes batches.
        self._reader, self._encoders, self._maker = (ThreadPoolExecutor(count) for count in (1, threads, 1))
        self._ahead: deque[Future[tuple[Future[np.ndarray], dict[str, Any]]]] = deque()
        self._depth = 2 * threads
        self._coming: Future[tuple[Batch, np.ndarray, dict[str, Any]]] | None = None
        self._closed = Event()

    def next(self) -> Batch:
        """The next step's batch.

        Raises:
            UserError: there is none, as `trouble` says; the state stays as it was.
        """
        batch, self._tokens, self._position = self._begun().result()
        self._coming = None
        self._begun()
        return batch

    def trouble(self, stop: Callable[[], bool] = lambda: False) -> UserError | None:
        """Why there will be no next batch; waits until that is known, or `stop` says that none is needed.

        A part without documents, a document that cannot be read, or (TryAgain) a network or a disk that fails.
        """
        while not stop():
            try:
                error = self._begun().exception(timeout=0.1)
            except TimeoutError:
                continue
            if error is None or isinstance(error, UserError):
                return error
            raise error
        return None

    def _begun(self) -> "Future[tuple[Batch, np.ndarray, dict[str, Any]]]":
        """The next batch, which is being made; what is left of the tokens after it; and where the reader stands."""
        if self._coming is None:
            self._coming = self._maker.submit(self._make, self._tokens, self._position)
        return self._coming

    def _make(self, tokens: np.ndarray, position: dict[str, Any]) -> tuple[Batch, np.ndarray, dict[str, Any]]:
        layout, size = self.layout, self.block_size
        sequences = layout.per_device * layout.micro_batches
        needed = sequences * size + 1
        chunks, have = [tokens], len(tokens)
        while have < needed:
            while len(self._ahead) < self._depth:
                self._ahead.append(self._reader.submit(self._read))
            encoding, position = self._ahead.popleft().result()
            chunks.append(encoding.result())
            have += len(chunks[-1])
        tokens = np.concatenate(chunks)
        block = torch.from_numpy(tokens[:needed].astype(np.int64))
        inputs, targets = block[:-1].view(sequences, size), block[1:].view(sequences, size)
        split = (_pinned(each).split(layout.per_device) for each in (inputs, targets))
        parts = list(zip(*split, strict=True))
        batch = Batch(parts, layout.sequences * size, _sha(inputs, targets), position["bad"][1])
        return batch, tokens[needed - 1 :], position  # the last target is the next input

    def state(self) -> dict[str, Any]:
        """Where this process's next batch begins, as JSON can hold it."""
        return {**self._position, "tokens": self._tokens.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Only before the first batch."""
        state = {"bad": [0, 0], **state}  # an earlier release left none out
        self._start(state["epoch"], state["reader"])
        self._bad_now, self._bad = state["bad"]
        self._ended, self._met = state["ended"], state["met"]
        self._rng.bit_generator.state = state["rng"]
        self._buffer = list(state["buffer"])
        self._characters = sum(map(len, self._buffer))
        self._tokens = np.array(state["tokens"], dtype=np.uint32)
        # Not a new snapshot: a reader says where it stands only once it has read.
        self._position = {name: state[name] for name in self._position}

    def close(self) -> None:
        """End the threads."""
        self._closed.set()
        for pool in (self._reader, self._encoders, self._maker):
            pool.shutdown(cancel_futures=True)

    def _start(self, epoch: int, reader: dict[str, Any] | None = None) -> None:
        """Begin a pass over the source, or go on with it where its `reader` stood."""
        self._epoch, self._ended, self._met, self._bad_now = epoch, False, False, 0
        self._dataset = self.documents.stream(self.layout.process, self.layout.processes, (self.seed, epoch))
        if reader is not None:
            self._dataset.load_state_dict(reader)
        self._from, self._moved = reader, False
        self._iterator = self.documents.rows(self._dataset)

    def _reader_state(self) -> dict[str, Any] | None:
        """Where the reader stands, which it says only once it has read something; None before the first row."""
        return self._dataset.state_dict() if self._moved else self._from

    def _read(self) -> tuple[Future[np.ndarray], dict[str, Any]]:
        texts = take_chunk(iter(self._draw, None))
        return self._encoders.submit(self.encoder.documents, texts), self._snapshot()

    def _row(self) -> dict[str, Any] | None:
        """The next row of the source, None at its end; tried again where it cannot be read for a reason that may pass.

        Raises:
            TryAgain: after the last try.
        """
        waits = iter(WAITS)
        while True:
            try:
                row = next(self._iterator, None)
            except TryAgain as error:
                reader = self._reader_state()  # what has failed cannot go on, but one that begins where it stood can
                wait_or_raise(error, waits, self._closed.wait)
                if self._closed.is_set():
                    raise
                kept = self._met, self._bad_now
                self._start(self._epoch, reader)
                self._met, self._bad_now = kept
            else:
                self._moved = True
                return row

    def _snapshot(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "reader": self._reader_state(),
            "ended": self._ended,
            "met": self._met,
            "bad": [self._bad_now, self._bad],
            "rng": self._rng.bit_generator.state,
            "buffer": list(self._buffer),
        }

    def _draw(self) -> str:
        """The next document: a random one of the buffer, which is filled up first."""
        while True:
            while not self._ended and len(self._buffer) < self.buffer_size and self._characters < BUFFER_CHARACTERS:
                row = self._row()
                if row is None:
                    self._ended = True
                    continue
                text = self.documents.text(row)
                if isinstance(text, BadDocument):
                    if self._bad_now >= self.documents.allowed:
                        raise too_many(text, self.documents.allowed)
                    self._bad_now, self._bad = self._bad_now + 1, self._bad + 1
                    continue
                self._met = True
                self._buffer.append(text)
                self._characters += len(text)
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
