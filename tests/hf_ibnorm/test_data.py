"""The embedded corpora."""

import pytest

from hf_ibnorm import load_corpus


@pytest.mark.parametrize(
    ("name", "documents"),
    [("austen", {"train": 4, "validation": 1, "test": 1}), ("sotu", {"train": 212, "validation": 10, "test": 11})],
)
def test_splits_partition_the_corpus(name, documents):
    splits = {split: load_corpus(name, split) for split in documents}
    assert {split: len(texts) for split, texts in splits.items()} == documents
    everything = [text for texts in splits.values() for text in texts]
    assert len(set(everything)) == sum(documents.values())


def test_austen_splits_are_the_documented_novels():
    assert load_corpus("austen", "validation")[0].startswith("NORTHANGER ABBEY")
    assert load_corpus("austen", "test")[0].startswith("Persuasion")


def test_sizes_are_those_of_the_sources():
    assert (
        sum(len(text) for split in ("train", "validation", "test") for text in load_corpus("austen", split))
        == 4_025_028
    )
    assert (
        10_600_000
        < sum(len(text) for split in ("train", "validation", "test") for text in load_corpus("sotu", split))
        < 10_800_000
    )


@pytest.mark.parametrize(
    ("name", "split", "message"), [("bronte", "train", "corpus: got 'bronte'"), ("sotu", "dev", "split: got 'dev'")]
)
def test_unknown_names_are_errors(name, split, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(name, split)
