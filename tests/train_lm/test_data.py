"""Tokenizer, packing and order: nothing lost, nothing twice, the same every time."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_ibnorm.data.tokens import Encoder
from train_lm.data import IGNORE, BlockOrder, PackedData, PackedTokens, StepShape, split_batch
from train_lm.tokenizer import END_OF_TEXT, train_tokenizer, wrap_tokenizer

TEXTS = ["It was a truth — universally acknowledged. " * 20, "Émile 日本 \x00\t ok", "A third, short one."]


@pytest.fixture(scope="module")
def tokenizer():
    return wrap_tokenizer(train_tokenizer(TEXTS, 300), 64)


def packed_texts(tokenizer, block_size):
    return PackedTokens(Encoder(tokenizer).documents(TEXTS), tokenizer.eos_token_id, block_size)


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in [*TEXTS, "never seen: ŧ¶😀\r\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_no_special_token_is_added_and_one_ends_texts(tokenizer):
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT
    assert tokenizer.eos_token_id not in tokenizer("plain")["input_ids"]


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert all(loaded(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert loaded.model_max_length == 64


def test_training_a_tokenizer_is_deterministic_across_processes():
    code = f"from train_lm.tokenizer import train_tokenizer; print(train_tokenizer({TEXTS!r}, 300))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == train_tokenizer(TEXTS, 300) + "\n"


@pytest.mark.parametrize("block_size", [2, 7, 16, 10_000])
def test_every_token_but_the_first_is_predicted_exactly_once(tokenizer, block_size):
    packed = packed_texts(tokenizer, block_size)
    inputs, targets = packed.batch(np.arange(packed.blocks))
    assert inputs.shape == targets.shape == (packed.blocks, block_size)
    counted = targets[targets != IGNORE].numpy()
    np.testing.assert_array_equal(counted, packed.stream[1:])
    assert packed.targets == len(counted)
    assert packed.padding == inputs.numel() - len(counted)
    np.testing.assert_array_equal(inputs.flatten()[: len(counted)].numpy(), packed.stream[:-1])


def test_stream_is_every_document_followed_by_the_end_of_text(tokenizer):
    packed = packed_texts(tokenizer, 8)
    eos = tokenizer.eos_token_id
    assert (packed.stream == eos).sum() == len(TEXTS)
    assert packed.stream[-1] == eos
    assert tokenizer.decode(packed.stream[packed.stream != eos]) == "".join(TEXTS)


def test_every_epoch_reads_each_block_once_in_an_order_of_its_own():
    order = BlockOrder(11, seed=4)
    epochs = order.take(0, 33).reshape(3, 11)
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(BlockOrder(11, seed=4).take(20, 5)) == list(epochs.flatten()[20:25])
    assert list(BlockOrder(11, seed=5).take(0, 11)) != list(epochs[0])


@pytest.mark.parametrize(("micro_batches", "processes"), [(1, 1), (8, 1), (2, 4), (1, 8)])
def test_splitting_a_global_batch_loses_and_repeats_nothing(micro_batches, processes):
    indices = np.arange(16)
    shapes = [StepShape(16 // micro_batches // processes, micro_batches, processes, each) for each in range(processes)]
    parts = [part for shape in shapes for part in split_batch(indices, shape)]
    assert sorted(np.concatenate(parts)) == list(range(16))
    first = [next(split_batch(indices, shape)) for shape in shapes]
    np.testing.assert_array_equal(np.concatenate(first), indices[: 16 // micro_batches])


def test_batches_are_torch_tensors_of_token_ids(tokenizer):
    inputs, targets = packed_texts(tokenizer, 8).batch(np.array([2, 0]))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == (2, 8)


def samples(data, steps):
    """Which blocks a process reads in so many steps: block i of this stream begins with the token i·B."""
    size = data.packed.block_size
    return [int(row[0]) // size for _ in range(steps) for inputs, _ in data.next().parts for row in inputs]


def numbered_blocks(blocks):
    return PackedTokens(np.arange(blocks * 4 + 1), 0, 4)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_processes_share_every_epoch_without_loss_or_overlap(processes, micro_batches):
    steps, epochs = 5, 2
    blocks = 3 * micro_batches * processes * steps
    shapes = [StepShape(3, micro_batches, processes, process) for process in range(processes)]
    readers = [PackedData(numbered_blocks(blocks), 7, shape) for shape in shapes]
    orders = []
    for _ in range(epochs):
        read = [samples(reader, steps) for reader in readers]
        assert sorted(np.concatenate(read)) == list(range(blocks))
        orders.append(read)
    assert orders[0] != orders[1]
    for reader in readers:
        reader.close()


def test_the_batch_made_ahead_does_not_count_before_it_is_taken():
    shape = StepShape(2, 1)
    straight, stopped = (PackedData(numbered_blocks(11), 3, shape) for _ in range(2))
    expected = samples(straight, 9)
    assert samples(stopped, 4) == expected[:8]
    on = PackedData(numbered_blocks(11), 3, shape)
    on.load_state(stopped.state())
    assert samples(on, 5) == expected[8:]
    for data in (straight, stopped, on):
        data.close()
