"""Corpora: the same documents from every kind of file, and one line that names the place where one is damaged."""

import errno
import gzip
import json
import lzma
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict

from hf_ibnorm.base.errors import TryAgain, UserError
from hf_ibnorm.base.files import sha256_file
from hf_ibnorm.data import files, load_corpus
from hf_ibnorm.data.files import PIECE, read_file
from train_lm.corpus import CorpusOptions, Files, HeldOut, Texts, open_corpus, overlap

ODD = [
    "one",
    "",
    "lines\u2028apart\u2029by\x85other\x0bsigns\x0c\x1c\x1d\x1e",
    "\r\nDOS\r\n\r\nand\rMac\n",
    "NUL \x00 and \ufeff and \x1a",
    "日本 😀 é e\u0301",
    '{"text": "no document"}\n\n{"text": "nor this"}',
    " ",
    "one",
]


def zstd(raw):
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def as_jsonl(texts, field="text", ascii_only=False):
    return "".join(json.dumps({"n": 1, field: text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()


def write_jsonl(path, texts, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACKERS.get(path.suffix, bytes)(as_jsonl(texts, field)))
    return path


def write_parquet(path, texts, field="text"):
    pq.write_table(pa.table({"n": list(range(len(texts))), field: texts}), path, row_group_size=4)
    return path


def opened(name, role="train", split="train", field="text", streaming=False, subset=None):
    return open_corpus(str(name), role, split, CorpusOptions(subset, field, streaming, sha256_file))


def error_of(act):
    """The message of the UserError that `act` ends with."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def texts_or_error(path):
    """The documents of a file, or the message of the UserError that reading it ends with."""
    try:
        return list(opened(path)), None
    except UserError as error:
        return None, str(error)


def noise(size):
    """Text that no packer makes much smaller."""
    draw = random.Random(0)
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ,.\n") for _ in range(size))


def flipped(raw, place):
    return raw[:place] + bytes([raw[place] ^ 0x10]) + raw[place + 1 :]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("ascii_only", [False, True])
def test_every_packing_of_jsonl_gives_the_same_documents(tmp_path, packing, ascii_only):
    path = tmp_path / f"odd.jsonl{packing}"
    path.write_bytes(PACKERS[packing](as_jsonl(ODD, ascii_only=ascii_only)))
    documents = opened(path)
    assert list(documents) == ODD
    assert list(documents) == ODD, "read again, it is the same"


def test_parquet_gives_the_documents_of_jsonl(tmp_path):
    many = [f"{text} {i}" for i in range(300) for text in ODD]
    assert list(opened(write_parquet(tmp_path / "a.parquet", ODD))) == ODD
    assert list(opened(write_parquet(tmp_path / "many.parquet", many))) == many


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("text", ODD)
def test_every_packing_of_a_text_file_gives_its_text_to_the_character(tmp_path, packing, text):
    path = tmp_path / f"odd.txt{packing}"
    path.write_bytes(PACKERS[packing](text.encode()))
    assert list(read_file(path, "text")) == ([text] if text else [])


def test_endings_may_be_in_capitals(tmp_path):
    path = tmp_path / "ODD.JSONL.GZ"
    path.write_bytes(gzip.compress(as_jsonl(ODD)))
    assert list(opened(path)) == ODD


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_packed_files_set_end_to_end_are_read_to_the_end(tmp_path, packing):
    path = tmp_path / f"a.jsonl{packing}"
    texts = [noise(200_000), *ODD]
    path.write_bytes(b"".join(PACKERS[packing](as_jsonl([text])) for text in texts))
    assert list(read_file(path, "text")) == texts


def test_lines_of_jsonl_may_be_blank_or_end_as_in_dos_or_not_at_all(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\r\n  \n\r\n{"text": "b"}\n{"text": "c"}')
    assert list(opened(path)) == ["a", "b", "c"]


def test_field_says_where_the_text_is(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", ODD, "body")
    parquet = write_parquet(tmp_path / "a.parquet", ODD, "body")
    assert list(opened(jsonl, field="body")) == list(opened(parquet, field="body")) == ODD


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_a_long_text_joined_are_the_text(tmp_path, seed):
    draw = random.Random(seed)
    words = ["word ", "\n", "\n\n", " \n", "\r\n", "\r", "\u2028", "\x00", "é😀", "\x85", "\n\n\n"]
    text = "".join(draw.choices(words, k=150_000))
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    pieces = list(opened(path))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(PIECE <= len(piece.encode()) < PIECE + 1000 for piece in pieces[:-1])
    assert all(not piece.removesuffix("\n").rpartition("\n")[2].strip() for piece in pieces[:-1]), "at empty lines"


def test_text_is_never_cut_within_a_paragraph(tmp_path):
    text = "a line\n" * 50_000
    (tmp_path / "long.txt").write_text(text)
    assert list(opened(tmp_path / "long.txt")) == [text]


def test_a_glob_is_its_files_in_the_order_of_their_names(tmp_path, monkeypatch):
    for name in ("b", "a", "c", "sub/d", "sub/deeper/e"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    (tmp_path / "readme.md").write_text("no text")
    (tmp_path / "f.jsonl").mkdir()
    assert list(opened(tmp_path / "*.jsonl")) == ["a", "b", "c"]
    assert list(opened(tmp_path / "[ab].jsonl")) == ["a", "b"]
    assert list(opened(tmp_path / "*" / "?.jsonl")) == ["sub/d"]
    assert list(opened(tmp_path / "**" / "*.jsonl")) == ["a", "b", "c", "sub/d", "sub/deeper/e"]
    assert opened(tmp_path / "*.jsonl", "validation") is None
    assert opened(tmp_path / "a.jsonl", "validation") is None
    monkeypatch.chdir(tmp_path)
    assert list(opened("*.jsonl")) == ["a", "b", "c"]
    assert list(opened("sub/d.jsonl")) == ["sub/d"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(opened("~/a.jsonl")) == ["a"]


def named_splits(folder):
    for name in ("train", "validation", "test"):
        write_jsonl(folder / f"{name}.jsonl", [f"of {name}"])


def listened(name, role="train"):
    """The texts of a corpus, and what is said about it."""
    said = []
    documents = open_corpus(str(name), role, role, CorpusOptions(None, "text", False, sha256_file, say=said.append))
    return documents and list(documents), said


def test_a_glob_does_not_train_on_what_is_named_validation_or_test_and_says_so(tmp_path):
    named_splits(tmp_path)
    for name in (tmp_path / "*.jsonl", tmp_path):
        texts, (line,) = listened(name)
        assert texts == ["of train"]
        for split in ("validation", "test"):
            assert f"{split}: {tmp_path / split}.jsonl" in line
        assert listened(name, "validation") == (["of validation"], [])


def test_a_glob_with_held_out_files_alone_is_refused_and_names_them(tmp_path):
    named_splits(tmp_path)
    message = error_of(lambda: opened(tmp_path / "*t*st*.jsonl"))
    assert all(word in message for word in ("to train on", f"test: {tmp_path / 'test.jsonl'}"))
    assert list(opened(tmp_path / "vali*.jsonl", "validation")) == ["of validation"]
    assert "to train on" in error_of(lambda: opened(tmp_path / "vali*.jsonl"))


def test_a_file_that_is_named_itself_is_trained_on_with_a_warning_where_its_name_says_otherwise(tmp_path):
    named_splits(tmp_path)
    assert listened(tmp_path / "train.jsonl") == (["of train"], [])
    texts, (line,) = listened(tmp_path / "test.jsonl")
    assert texts == ["of test"]
    assert line.startswith(f"WARNING: corpus: {tmp_path / 'test.jsonl'} is trained on")


def test_validation_text_that_is_trained_on_is_known_by_its_content(tmp_path):
    named_splits(tmp_path)
    (tmp_path / "deep").mkdir()
    shutil.copyfile(tmp_path / "validation.jsonl", tmp_path / "deep" / "copy.jsonl")
    train, validation = opened(tmp_path), opened(tmp_path, "validation")
    assert overlap(train, validation) == str(tmp_path / "validation.jsonl")
    assert overlap(train, opened(tmp_path / "test.jsonl")) == ""
    assert overlap(train, opened(tmp_path)) == overlap(Texts(["a"]), Texts(["a"])) == "all of it"
    assert overlap(Texts(["a"]), Texts(["b"])) == overlap(train, Texts(["a"])) == ""


def test_a_file_whose_name_has_brackets_is_that_file(tmp_path):
    assert list(opened(write_jsonl(tmp_path / "run[1]" / "a*.jsonl", ["kept"]))) == ["kept"]


def test_a_folder_is_split_by_the_words_in_its_names(tmp_path):
    splits = {
        "train": ["contest.jsonl", "deeper/devices.jsonl.zst", "latest-1.jsonl", "train-0.jsonl", "train-1.jsonl.gz"],
        "validation": ["deeper/dev/part.jsonl", "my_valid.jsonl", "val/0.jsonl.xz", "validation.jsonl"],
        "test": ["test.jsonl", "test/0.jsonl", "deeper/testing-0.jsonl", "eval.jsonl", "evaluation-0.jsonl"],
        "neither": [".hidden.jsonl", ".git/train.jsonl"],
    }
    for names in splits.values():
        for name in names:
            write_jsonl(tmp_path / name, [name])
    (tmp_path / "notes.md").write_text("no text")
    (tmp_path / "train.csv").write_text("no text")
    assert list(opened(tmp_path)) == splits["train"]
    assert list(opened(tmp_path, "validation", "validation")) == splits["validation"]


def test_a_folder_may_hold_several_kinds_and_nothing_to_validate_on(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    write_jsonl(tmp_path / "b.jsonl", ["b"])
    write_parquet(tmp_path / "c.parquet", ["c"])
    assert list(opened(tmp_path)) == ["a", "b", "c"]
    assert opened(tmp_path, "validation", "validation") is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset_gives_its_texts(tmp_path, streaming):
    Dataset.from_dict({"n": list(range(len(ODD))), "body": ODD}).save_to_disk(tmp_path / "one", num_shards=3)
    documents = opened(tmp_path / "one", field="body", streaming=streaming)
    assert list(documents) == list(documents) == ODD
    assert (documents.fingerprint is None) == streaming
    assert opened(tmp_path / "one", "validation", "validation", "body", streaming) is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dictionary_of_datasets_gives_the_split_asked_for(tmp_path, streaming):
    splits = {"train": ["a", "b"], "held_out": ["c"]}
    DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in splits.items()}).save_to_disk(tmp_path)
    assert list(opened(tmp_path, streaming=streaming)) == ["a", "b"]
    assert list(opened(tmp_path, "validation", "held_out", streaming=streaming)) == ["c"]
    assert opened(tmp_path, "validation", "validation", streaming=streaming) is None
    message = error_of(lambda: opened(tmp_path, "train", "training", streaming=streaming))
    assert all(word in message for word in ("train_split", "'training'", "train, held_out"))


@pytest.mark.parametrize("role", ["train", "validation"])
def test_an_embedded_corpus_is_its_documents(role):
    documents = opened("sotu", role, role)
    assert list(documents) == load_corpus("sotu", role)
    assert documents.fingerprint == Texts(load_corpus("sotu", role)).fingerprint


@pytest.mark.parametrize("every", [1, 2, 5, 17, 100])
def test_held_out_documents_and_the_rest_are_all_of_them_once(every):
    texts = [f"text {i}" for i in range(17)]
    held, rest = (HeldOut(Texts(texts), every, rest=rest) for rest in (False, True))
    assert list(held) == list(held) == texts[::every]
    assert list(rest) == [text for text in texts if text not in texts[::every]]
    assert sorted([*held, *rest]) == sorted(texts)


def test_fingerprints_of_texts_tell_texts_and_their_order_and_limits_apart():
    variants = [["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], ["ab", "c", ""], ["ab", "C"], []]
    assert len({Texts(texts).fingerprint for texts in variants}) == len(variants)
    assert Texts(["ab", "c"]).fingerprint == Texts(["ab", "c"]).fingerprint


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_fingerprint_of_files_follows_content_order_and_field_but_not_the_path(tmp_path, write):
    ending = {write_jsonl: "jsonl", write_parquet: "parquet"}[write]
    first, second = write(tmp_path / f"a.{ending}", ["a", "b"]), write(tmp_path / f"b.{ending}", ["c"])
    moved = [tmp_path / f"elsewhere.{ending}", tmp_path / f"again.{ending}"]
    for source, copy in zip((first, second), moved, strict=True):
        shutil.copyfile(source, copy)
    swapped, changed = write(tmp_path / f"c.{ending}", ["b", "a"]), write(tmp_path / f"d.{ending}", ["a", "B"])
    fingerprint = Files([first, second], "text").fingerprint
    assert Files(moved, "text").fingerprint == fingerprint
    others = {
        Files([second, first], "text").fingerprint,
        Files([first], "text").fingerprint,
        Files([swapped, second], "text").fingerprint,
        Files([changed, second], "text").fingerprint,
        Files([first, second], "n").fingerprint,
    }
    assert len(others - {fingerprint}) == 5


def test_fingerprint_of_files_tells_kinds_apart(tmp_path):
    """The same bytes are one document as .txt and many as .jsonl."""
    for ending in ("txt", "jsonl"):
        (tmp_path / f"a.{ending}").write_bytes(as_jsonl(ODD))
    assert Files([tmp_path / "a.txt"], "text").fingerprint != Files([tmp_path / "a.jsonl"], "text").fingerprint


def test_fingerprint_of_a_saved_dataset_follows_content_order_and_field_but_not_the_path(tmp_path):
    def fingerprint(name, texts, field="text"):
        if not (tmp_path / name).exists():
            Dataset.from_dict({"text": texts, "other": texts}).save_to_disk(tmp_path / name)
        return opened(tmp_path / name, field=field).fingerprint

    first = fingerprint("a", ["a", "b"])
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert fingerprint("moved", ["a", "b"]) == first
    others = {
        fingerprint("swapped", ["b", "a"]),
        fingerprint("changed", ["a", "B"]),
        fingerprint("longer", ["a", "b", "b"]),
        fingerprint("a", ["a", "b"], "other"),
    }
    assert len(others - {first}) == 4


def test_fingerprint_of_a_saved_dataset_follows_its_content_and_not_the_note_beside_it(tmp_path):
    for name, texts in (("a", ["first"]), ("b", ["other"])):
        Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / name)
    before = opened(tmp_path / "a").fingerprint
    data = "data-00000-of-00001.arrow"
    shutil.copyfile(tmp_path / "b" / data, tmp_path / "a" / data)
    documents = opened(tmp_path / "a")
    assert list(documents) == ["other"]
    assert documents.fingerprint != before


def test_what_cannot_be_read_for_a_while_is_read_again(tmp_path, monkeypatch, capsys):
    path, opens = write_jsonl(tmp_path / "a.jsonl", ODD), []

    def failing(path, *words):
        opens.append(path)
        if len(opens) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return path.open("rb")

    monkeypatch.setattr(files, "_open", failing)
    monkeypatch.setattr(files, "WAITS", (0.0, 0.0))
    assert list(opened(path)) == ODD
    assert len(capsys.readouterr().err.splitlines()) == 2
    opens.clear()
    monkeypatch.setattr(files, "WAITS", (0.0,))
    with pytest.raises(TryAgain, match=r"a\.jsonl cannot be read: .*Input/output error"):
        list(opened(path))


def test_fingerprint_of_held_out_documents_says_which_they_are(tmp_path):
    parts = [HeldOut(Texts(texts), every, rest) for texts in (["a"], ["b"]) for every in (2, 3) for rest in (0, 1)]
    assert len({part.fingerprint for part in parts} | {Texts(["a"]).fingerprint}) == 9
    Dataset.from_dict({"text": ODD}).save_to_disk(tmp_path)
    assert HeldOut(opened(tmp_path, streaming=True), 2, rest=True).fingerprint is None


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_packed_file_cut_off_anywhere_is_one_line_that_names_it(tmp_path, kind, packing):
    raw = noise(300_000).encode() if kind == ".txt" else as_jsonl(noise(300_000).split("\n"))
    packed, path = PACKERS[packing](raw), tmp_path / f"cut{kind}{packing}"
    for length in (1, 20, len(packed) // 3, len(packed) // 2, len(packed) - 20, len(packed) - 1):
        path.write_bytes(packed[:length])
        assert str(path) in error_of(lambda: list(opened(path)))


@pytest.mark.parametrize("options", [{}, {"write_checksum": True}, {"write_content_size": False}])
def test_a_zstandard_file_that_lacks_its_last_block_is_no_shorter_corpus(tmp_path, options):
    packed, path = zstandard.ZstdCompressor(**options).compress(noise(300_000).encode()), tmp_path / "cut.txt.zst"
    path.write_bytes(packed[: len(packed) * 3 // 4])
    assert str(path) in error_of(lambda: list(opened(path)))


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_a_packed_file_with_a_wrong_bit_is_never_other_text(tmp_path, packing):
    texts = noise(20_000).split("\n")
    packed, path = PACKERS[packing](as_jsonl(texts)), tmp_path / f"flipped.jsonl{packing}"
    refused = 0
    for place in range(0, len(packed), len(packed) // 60):
        path.write_bytes(flipped(packed, place))
        found, message = texts_or_error(path)
        if message is None:
            assert found == texts  # some bits mean nothing
        else:
            refused += 1
            assert str(path) in message
            assert len(message.splitlines()) == 1, message
    assert refused > 50


@pytest.mark.parametrize(
    "row",
    [
        b"no JSON",
        b'{"text": "cut off',
        b'{"text": "\xff"}',
        b'{"text": "\xc3"}',
        rb'{"text": "half of a pair: \ud83d"}',
        b"[" * 100_000,
        b'{"other": "no text"}',
        b'{"text": null}',
        b'{"text": 7}',
        b'{"text": ["a"]}',
        b"{}",
        b"[]",
        b'"text"',
        b"7",
    ],
    ids=lambda row: row[:30].decode(errors="replace"),
)
def test_a_bad_line_of_jsonl_is_one_line_that_names_it(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + row + b'\n{"text": "good"}\n')
    message = error_of(lambda: list(opened(path)))
    assert str(path) in message
    assert "line 2" in message or "decode byte" in message


@pytest.mark.parametrize("packing", PACKERS)
def test_text_that_is_no_utf8_is_one_line_that_names_the_file(tmp_path, packing):
    path = tmp_path / f"latin.txt{packing}"
    path.write_bytes(PACKERS[packing]("café".encode("latin-1")))
    assert str(path) in error_of(lambda: list(opened(path)))


def test_parquet_cut_off_anywhere_is_one_line_that_names_it(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [noise(50) for _ in range(40)])
    raw = path.read_bytes()
    for damaged in [*(raw[:length] for length in (0, 3, 100, len(raw) // 2, len(raw) - 1)), b"PAR1" * 50]:
        path.write_bytes(damaged)
        assert str(path) in error_of(lambda: list(opened(path)))


def test_parquet_with_a_wrong_bit_in_its_footer_is_read_or_one_line_that_names_it(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [noise(50) for _ in range(40)])
    raw = path.read_bytes()
    refused = 0
    for place in range(len(raw) - 400, len(raw)):
        path.write_bytes(flipped(raw, place))
        _, message = texts_or_error(path)
        if message is not None:  # not every byte matters
            refused += 1
            assert str(path) in message
            assert len(message.splitlines()) == 1, message
    assert refused > 50


@pytest.mark.parametrize("column", [[1, 2], ["a", None], [["a"], ["b"]], [b"a", b"b"]], ids=repr)
def test_parquet_rows_without_text_are_one_line_that_names_the_file(tmp_path, column):
    path = write_parquet(tmp_path / "a.parquet", column)
    message = error_of(lambda: list(opened(path)))
    assert "text_field" in message
    assert str(path) in message


def test_a_column_that_is_not_there_is_one_line_with_those_that_are(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a"], "body")
    message = error_of(lambda: list(opened(path)))
    assert all(word in message for word in ("text_field", str(path), "n, body"))
    Dataset.from_dict({"n": [1], "body": ["a"]}).save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        message = error_of(lambda streaming=streaming: opened(tmp_path / "saved", streaming=streaming))
        assert all(word in message for word in ("text_field", "n, body"))


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a", "a.txt.bz2", "a.jsonl.gz.part", "txt", "a.parquet.gz"])
def test_a_file_of_an_unknown_kind_is_one_line_that_names_it(tmp_path, name):
    (tmp_path / name).write_text("text")
    assert str(tmp_path / name) in error_of(lambda: list(opened(tmp_path / name)))


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl.zst", "./gone", "/gone", "~/gone", "gone/*.txt", "/gone*"])
def test_a_file_that_is_not_there_is_one_line_that_names_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = error_of(lambda: opened(name))
    assert all(word in message for word in ("corpus", name, "no such file"))


@pytest.mark.parametrize("role", ["train", "validation"])
def test_a_folder_with_nothing_to_train_on_is_one_line_that_names_it(tmp_path, role):
    assert str(tmp_path) in error_of(lambda: opened(tmp_path, role, role))
    write_jsonl(tmp_path / "test.jsonl", ["a"])
    (tmp_path / "notes.md").write_text("a")
    assert str(tmp_path) in error_of(lambda: opened(tmp_path, role, role))


def test_a_name_that_nothing_has_is_one_line_with_the_nearest_corpus():
    message = error_of(lambda: opened("austenn"))
    assert "'austenn'" in message
    assert "did you mean 'austen'?" in message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("data-00000-of-00001.arrow", lambda raw: raw[: len(raw) // 2]),
        ("data-00000-of-00001.arrow", lambda raw: b""),
        ("data-00000-of-00001.arrow", None),
        ("dataset_info.json", lambda raw: raw[:20]),
        ("dataset_info.json", None),
        ("state.json", lambda raw: raw[:20]),
        ("state.json", lambda raw: b'{"global_step": 500}'),
    ],
)
def test_a_damaged_saved_dataset_is_one_line_that_names_it(tmp_path, file, damage, streaming):
    Dataset.from_dict({"text": ODD}).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    assert str(tmp_path / "saved") in error_of(lambda: list(opened(tmp_path / "saved", streaming=streaming)))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_file_is_loaded_as_a_dataset_by_its_name(tmp_path, streaming):
    from train_lm.corpus import CorpusOptions, open_dataset

    # A folder takes the same way through `datasets` as a name on the Hub.
    for split in ("train", "validation"):
        rows = [json.dumps({"body": f"{split} {i}"}) + "\n" for i in range(3)]
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    options = CorpusOptions(None, "body", streaming, sha256_file)
    for split in ("train", "validation"):
        assert list(open_dataset(str(tmp_path), split, split, options)) == [f"{split} {i}" for i in range(3)]
    assert open_dataset(str(tmp_path), "validation", "dev", options) is None
    with pytest.raises(UserError, match="train_split: got 'all', the dataset has train, validation"):
        open_dataset(str(tmp_path), "train", "all", options)
    with pytest.raises(UserError, match="text_field: got 'text', the dataset has body"):
        list(open_dataset(str(tmp_path), "train", "train", CorpusOptions(None, "text", streaming, sha256_file)))
    with pytest.raises(UserError, match="no embedded corpus .* and no dataset that could be loaded"):
        open_dataset("nobody/nothing", "train", "train", options)


@pytest.mark.parametrize(
    ("names", "name", "taken"),
    [
        (["validation.txt"], "validation.txt", ["validation.txt"]),
        (["test-1.txt", "test-2.txt"], "*.txt", ["test-1.txt", "test-2.txt"]),
        (["train.txt", "validation.txt", "test.txt"], "", ["validation.txt"]),
        (["a.txt", "test.txt"], "*.txt", ["a.txt"]),
    ],
)
def test_files_to_validate_on_are_taken_without_a_word_about_training(tmp_path, names, name, taken):
    for each in names:
        (tmp_path / each).write_text(f"text of {each}")
    said = []
    options = CorpusOptions(None, "text", False, sha256_file, say=said.append)
    documents = open_corpus(str(tmp_path / name), "alone", "validation", options)
    assert [path.name for path in documents.paths] == taken
    assert not said
