"""Tokens to batches: packing, the order in which training reads, and the position in that order.

A finite corpus is one array of tokens. The blocks of step k depend on the seed and on the number of blocks read before:
the position is one number. A stream is read, shuffled and tokenized while training goes on: the position is
everything between the reader of the source and the last batch.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from .tasks import Batch, Batches, StepShape

IGNORE = -100  # target of a position that counts in no loss, as in torch's cross entropy
BUFFER_CHARACTERS = 1 << 26  # of the documents in a shuffle buffer, at most: checkpoints hold the buffer too


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
        """Inputs and targets of the blocks `indices`, int64 of shape (len(indices), B); a block past the last one is
        all padding."""
        places = np.asarray(indices)[:, None] * self.block_size + np.arange(self.block_size + 1)
        tokens = self.stream[np.minimum(places, self.targets)].astype(np.int64)
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        past = places[:, 1:] > self.targets
        inputs[past], targets[past] = self.eos, IGNORE
        return torch.from_numpy(inputs), torch.from_numpy(targets)


class BlockOrder:
    """The endless order in which training reads blocks: each epoch a fresh permutation, drawn from (seed, epoch).

    A step reads the next `size` places whatever the number of processes and micro-batches, so that every division of
    a step sees the same data; an epoch may end inside a step, and no block is left out.
    """

    def __init__(self, blocks: int, seed: int) -> None:
        self.blocks, self.seed = blocks, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, start: int, size: int) -> np.ndarray:
        """Block indices at places start … start+size-1 of the order."""
        indices = []
        for place in range(start, start + size):
            epoch, offset = divmod(place, self.blocks)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng((self.seed, epoch)).permutation(self.blocks)
            indices.append(int(self._order[offset]))
        return np.array(indices)


def split_batch(indices: np.ndarray, shape: StepShape) -> Iterator[np.ndarray]:
    """This process's part of the `indices` of a step, one array for each micro-batch."""
    for part in indices.reshape(shape.micro_batches, shape.processes, -1):
        yield part[shape.process]


def _pinned(tensor: Tensor) -> Tensor:
    """`tensor` in memory from which a GPU can copy while the program goes on."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _sha(inputs: Tensor, targets: Tensor) -> str:
    return sha256([inputs.numpy().tobytes(), targets.numpy().tobytes()])[:16]


class PackedData(Batches):
    """A finite corpus, read in an order that depends on the seed alone; `bad` documents were left out of it.

    The position is a place in that order, equal on every process and for every number of processes.
    """

    shared_sha = True

    def __init__(self, packed: PackedTokens, seed: int, shape: StepShape, bad: int = 0) -> None:
        super().__init__(shape)
        self.packed, self.position = packed, 0
        self._bad = 0 if shape.process else bad  # every process has left out the same documents
        self._order = BlockOrder(packed.blocks, seed)

    def make(self, position: int) -> tuple[Batch, int]:
        indices = self._order.take(position, self.shape.sequences)
        inputs, targets = self.packed.batch(indices)
        mine = split_batch(np.arange(len(indices)), self.shape)
        parts = [(_pinned(inputs[rows]), _pinned(targets[rows])) for rows in mine]
        batch = Batch(parts, int((targets != IGNORE).sum()), _sha(inputs, targets), self._bad)
        return batch, position + self.shape.sequences

    def state(self) -> dict[str, Any]:
        return {"place": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["place"]


class StreamedData(Batches):
    """An endless stream of documents: each process reads its part, shuffles it in a buffer, tokenizes and packs it.

    A pass over the part gives every document once: the buffer is emptied before the next pass begins. Threads read and
    tokenize ahead of training and make the next batch, so that a failure is known while the state is still one to go
    on from: `trouble` returns it. The `datasets` library can save the position of its reader but not the documents
    that are being shuffled; so the state holds the buffer too, as it was after the last document that training has met.

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
        shape: StepShape,
    ) -> None:
        super().__init__(shape)
        self.documents, self.encoder = documents, encoder
        self.block_size, self.seed, self.buffer_size = block_size, seed, buffer
        self._bad = 0
        self._start(epoch=0)
        self._rng = np.random.default_rng((seed, shape.process))
        self._buffer: list[str] = []
        self._characters = 0
        # The tokens that the last batch has left, of which the first is an input only, and the state of the reader.
        self.position = np.array([encoder.eos], dtype=np.uint32), self._snapshot()
        # One thread reads, so that the order of documents is that of the source; several tokenize.
        self._reader, self._encoders = ThreadPoolExecutor(1), ThreadPoolExecutor(threads)
        self._ahead: deque[Future[tuple[Future[np.ndarray], dict[str, Any]]]] = deque()
        self._depth = 2 * threads
        self._closed = Event()

    def trouble(self, stop: Callable[[], bool] = lambda: False) -> UserError | None:
        """Of a stream: a part without documents, a document that cannot be read, or (TryAgain) a network or a disk that
        fails."""
        while not stop():
            try:
                error = self.coming().exception(timeout=0.1)
            except TimeoutError:
                continue
            if error is None or isinstance(error, UserError):
                return error
            raise error
        return None

    def make(self, position: tuple[np.ndarray, dict[str, Any]]) -> tuple[Batch, tuple[np.ndarray, dict[str, Any]]]:
        tokens, reader = position
        shape, size = self.shape, self.block_size
        sequences = shape.per_device * shape.micro_batches
        needed = sequences * size + 1
        chunks, length = [tokens], len(tokens)
        while length < needed:
            while len(self._ahead) < self._depth:
                self._ahead.append(self._reader.submit(self._read))
            encoding, reader = self._ahead.popleft().result()
            chunks.append(encoding.result())
            length += len(chunks[-1])
        tokens = np.concatenate(chunks)
        block = torch.from_numpy(tokens[:needed].astype(np.int64))
        inputs, targets = block[:-1].view(sequences, size), block[1:].view(sequences, size)
        split = (_pinned(side).split(shape.per_device) for side in (inputs, targets))
        parts = list(zip(*split, strict=True))
        batch = Batch(parts, shape.sequences * size, _sha(inputs, targets), reader["bad"][1])
        return batch, (tokens[needed - 1 :], reader)  # the last target is the next input

    def state(self) -> dict[str, Any]:
        tokens, reader = self.position
        return {**reader, "tokens": tokens.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        state = {"bad": [0, 0], **state}  # an earlier release left no document out
        self._start(state["epoch"], state["reader"])
        self._bad_now, self._bad = state["bad"]
        self._ended, self._met = state["ended"], state["met"]
        self._rng.bit_generator.state = state["rng"]
        self._buffer = list(state["buffer"])
        self._characters = sum(map(len, self._buffer))
        # Not a new snapshot: a reader tells its position only once it has read.
        reader = {name: state[name] for name in self.position[1]}
        self.position = np.array(state["tokens"], dtype=np.uint32), reader

    def close(self) -> None:
        self._closed.set()
        for pool in (self._reader, self._encoders, self._maker):
            pool.shutdown(cancel_futures=True)

    def _start(self, epoch: int, reader: dict[str, Any] | None = None) -> None:
        """Begin a pass over the source, or go on with it at the position of its `reader`."""
        from datasets.distributed import split_dataset_by_node

        self._epoch, self._ended, self._met, self._bad_now = epoch, False, False, 0
        # Shards are dealt out where that is possible evenly; else each process reads one of so many documents.
        whole = self.documents.stream((self.seed, epoch))
        self._dataset = split_dataset_by_node(whole, self.shape.process, self.shape.processes)
        if reader is not None:
            self._dataset.load_state_dict(reader)
        self._from, self._moved = reader, False
        self._iterator = self.documents.rows(self._dataset)

    def _reader_state(self) -> dict[str, Any] | None:
        """The position of the reader, which it tells only once it has read something; None before the first row."""
        return self._dataset.state_dict() if self._moved else self._from

    def _read(self) -> tuple[Future[np.ndarray], dict[str, Any]]:
        texts = take_chunk(iter(self._draw, None))
        return self._encoders.submit(self.encoder.documents, texts), self._snapshot()

    def _row(self) -> dict[str, Any] | None:
        """The next row of the source, None at its end; tried again where a failure may pass, and TryAgain at last."""
        waits = iter(WAITS)
        while True:
            try:
                row = next(self._iterator, None)
            except TryAgain as error:
                reader = self._reader_state()  # an iterator that has failed gives no more rows: a new one goes on here
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
                    f"corpus: process {self.shape.process} of {self.shape.processes} gets no document of it"
                )
            self._start(self._epoch + 1)
