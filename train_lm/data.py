"""Text to batches: the tokenizer, the packed token stream, and the order in which training reads it."""

from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
IGNORE = -100
"""Target of a position that counts in no loss, as in torch's cross entropy."""


def train_tokenizer(documents: list[str], vocab_size: int) -> str:
    """Train a byte-level BPE tokenizer on `documents`.

    Every byte has a token, so no text is unknown; the one special token stands between documents. Deterministic.

    Args:
        documents: the training split.
        vocab_size: at least 257 (256 bytes and the special token); small corpora may give fewer tokens.

    Returns:
        The tokenizer as the JSON text of the `tokenizers` library.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer.to_str()


def wrap_tokenizer(json_text: str, context: int) -> PreTrainedTokenizerFast:
    """The trained tokenizer as Transformers knows it; text starts after the end of the text before."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json_text),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


class PackedTokens:
    """Documents as one stream of tokens, each followed by the end-of-text token, cut into blocks.

    Block i has inputs stream[i·B : (i+1)·B] and as targets the same shifted by one, so that every token but the very
    first is predicted exactly once. The last block is filled up with positions that count in no loss.

    Args:
        tokenizer: a tokenizer with an end-of-text token.
        documents: texts, at least one of them not empty.
        block_size: B, tokens a block.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, documents: list[str], block_size: int) -> None:
        eos = tokenizer.eos_token_id
        # The backend directly: a whole novel in one call would only draw a warning about the context length.
        encoded = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
        self.stream = np.concatenate([np.array([*document.ids, eos], dtype=np.int64) for document in encoded])
        self.block_size = block_size
        self.targets = len(self.stream) - 1
        """Tokens predicted in one pass over all blocks."""
        self.blocks = -(-self.targets // block_size)
        self.padding = self.blocks * block_size - self.targets
        """Positions of the last block that count in no loss."""
        self._inputs = np.full(self.blocks * block_size, eos)
        self._inputs[: self.targets] = self.stream[:-1]
        self._targets = np.full(self.blocks * block_size, IGNORE)
        self._targets[: self.targets] = self.stream[1:]

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 of shape (len(indices), B), of the blocks `indices`."""
        inputs = self._inputs.reshape(self.blocks, -1)[indices]
        targets = self._targets.reshape(self.blocks, -1)[indices]
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


def split_batch(indices: np.ndarray, micro_batches: int, processes: int, process: int) -> Iterator[np.ndarray]:
    """This process's part of a global batch, one array of block indices for each micro-batch."""
    for part in indices.reshape(micro_batches, processes, -1):
        yield part[process]
