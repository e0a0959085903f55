"""Text files, as the whole house reads them: which files a name stands for, and the documents in them."""

import errno
import gzip
import json
import lzma
import os
from itertools import chain, islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import zstandard

from hf_ibnorm.base.errors import TryAgain, UserError
from hf_ibnorm.base.reading import may_pass
from hf_ibnorm.data import files
from hf_ibnorm.data.files import BadDocument, find_files, read_file, retried

PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("packing", PACKERS)
def test_a_byte_order_mark_is_no_text(tmp_path, packing):
    raw = {"txt": "é text".encode(), "jsonl": b'{"text": "\xc3\xa9 text"}\n'}
    for kind, content in raw.items():
        path = tmp_path / f"a.{kind}{packing}"
        path.write_bytes(PACKERS[packing](BOM + content))
        assert list(read_file(path)) == ["é text"]
    path.write_bytes(PACKERS[packing](b'{"text": "\xef\xbb\xbfwithin"}'))
    assert list(read_file(path)) == ["\ufeffwithin"], "elsewhere it is text"


def test_one_bad_document_is_not_the_end_of_the_others(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n{"te\n{"text": 2}\n[]\n{"text": "\xff"}\n{"text": "\\ud83d"}\n{"text": "3"}\n')
    found = list(read_file(path))
    assert [each for each in found if not isinstance(each, BadDocument)] == ["1", "3"]
    for number, each in enumerate(found[1:-1], 2):
        assert f"{path}, line {number}," in str(each)
        assert len(str(each).splitlines()) == 1


def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path):
    column = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffc")]
    )
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    first, bad, last = read_file(tmp_path / "a.parquet")
    assert (first, last) == ("a", "c")
    assert isinstance(bad, BadDocument)
    assert "a.parquet, row 2," in str(bad)


def test_a_bad_piece_of_a_text_file_is_named_by_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 10)
    (tmp_path / "a.txt").write_bytes(b"0123456789\n\n\xff123456789\n\nlast")
    first, bad, last = read_file(tmp_path / "a.txt")
    assert (first, last) == ("0123456789\n\n", "last")
    assert isinstance(bad, BadDocument)
    assert "a.txt, bytes 12 to 24," in str(bad)


@pytest.mark.parametrize("text", ["word " * 3000, "a line\n" * 2000, "好" * 5000, "😀" * 4000, "x" * 15_000])
def test_a_text_without_empty_lines_is_cut_where_it_gets_too_long_and_never_within_a_character(
    tmp_path, monkeypatch, text
):
    monkeypatch.setattr(files, "PIECE", 500)
    monkeypatch.setattr(files, "LONGEST_PIECE", 1001)
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_file(tmp_path / "a.txt"))
    assert "".join(pieces) == text
    assert all(500 <= len(piece.encode()) <= 1001 for piece in pieces[:-1])
    if "\n" in text:
        assert all(piece.endswith("\n") for piece in pieces)
    elif " " in text:
        assert all(piece.endswith("word") for piece in pieces[:-1])


@pytest.mark.parametrize("words", ["*", "*/*", "**/*"])
def test_a_glob_is_split_by_names_as_a_folder_is(tmp_path, words):
    folder = tmp_path / "test" / ("data" if words == "*" else "")  # where no star stands, names say nothing
    parts = {
        "train": ["data/a.jsonl", "data/contest.jsonl"],
        "validation": ["data/dev.jsonl"],
        "test": ["data/test-1.jsonl"],
    }
    for name in chain(*parts.values()):
        path = tmp_path / "test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    expected = {split: [tmp_path / "test" / name for name in names] for split, names in parts.items()}
    assert find_files(f"{folder}/{words}.jsonl") == find_files(str(folder)) == expected
    assert find_files(str(tmp_path / "test" / "data" / "dev.jsonl")) == {"train": expected["validation"]}


def test_links_are_followed_and_what_begins_with_a_dot_is_not(tmp_path):
    for name in ("real/a.txt", "real/deep/b.txt", "corpus/.hidden/c.txt", "corpus/.d.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    corpus = tmp_path / "corpus"
    (corpus / "linked").symlink_to(tmp_path / "real")
    (corpus / "e.txt").symlink_to(tmp_path / "real" / "a.txt")
    expected = {"train": [corpus / name for name in ("e.txt", "linked/a.txt", "linked/deep/b.txt")]}
    assert find_files(str(corpus)) == find_files(f"{corpus}/**/*.txt") == find_files(f"{corpus}/**") == expected
    assert find_files(f"{corpus}/*/*.txt") == {"train": [corpus / "linked" / "a.txt"]}
    assert find_files(f"{corpus}/.*/*.txt") == {"train": [corpus / ".hidden" / "c.txt"]}
    (tmp_path / "real" / "again").symlink_to(corpus)
    for name in (str(corpus), f"{corpus}/**/*.txt"):
        with pytest.raises(UserError, match="linked/again leads back to a folder that it is in"):
            find_files(name)


@pytest.mark.parametrize("pattern", ["", "/*.txt", "/**/*.txt", "/*/*.txt"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, pattern):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("text")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"gone\.txt is a link that leads nowhere"):
        find_files(f"{tmp_path}{pattern}")


@pytest.mark.parametrize("pattern", ["", "/**/*.txt", "/*/*.txt"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, pattern):
    """Tests may run as root, who may read every folder."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="closed cannot be read: .*Permission denied") as caught:
        find_files(f"{tmp_path}{pattern}")
    assert not isinstance(caught.value, TryAgain)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *(
            (OSError(getattr(errno, name), "x"), True)
            for name in ("EIO", "ESTALE", "ETIMEDOUT", "EMFILE", "ECONNRESET")
        ),
        *((OSError(getattr(errno, name), "x"), False) for name in ("ENOENT", "EACCES", "EISDIR", "ENOSPC")),
        (ConnectionError("down"), True),
        (TimeoutError("slow"), True),
        (FileNotFoundError("of a library, without a number"), False),
        (OSError("ZSTD decompression failed"), False),
        (gzip.BadGzipFile("not a gzip file"), False),
        (ValueError("damaged"), False),
    ],
    ids=repr,
)
def test_what_may_pass_is_told_from_what_stays(error, passes):
    assert may_pass(error) is passes
    wrapped = RuntimeError("of a library that hides it")
    wrapped.__cause__ = error
    assert may_pass(wrapped) is passes


@pytest.mark.parametrize(("status", "passes"), [(404, False), (403, False), (429, True), (503, True)])
def test_a_servers_answer_says_whether_it_may_pass(status, passes):
    answer = requests.Response()
    answer.status_code = status
    with pytest.raises(requests.HTTPError) as caught:
        answer.raise_for_status()
    assert may_pass(caught.value) is passes
    assert may_pass(requests.ConnectionError("down"))


class Failing:
    """Ten items, of which each of `times` tries gives one more before the disk fails."""

    def __init__(self, times):
        self.times, self.tries = times, 0

    def __call__(self):
        self.tries += 1
        yield from islice(range(10), self.tries if self.tries <= self.times else None)
        if self.tries <= self.times:
            raise TryAgain("corpus: a disk failed")


def test_what_fails_for_a_while_is_read_on_where_it_stopped_with_ever_longer_pauses(capsys):
    pauses = []
    assert list(retried(Failing(3), pauses.append)) == list(range(10))
    assert pauses == [1, 1, 1], "something new came between them"
    assert capsys.readouterr().err.splitlines() == ["corpus: a disk failed; trying again in 1 s"] * 3

    def never():
        raise TryAgain("corpus: a disk failed")
        yield

    pauses.clear()
    with pytest.raises(TryAgain):
        list(retried(never, pauses.append))
    assert pauses == list(files.WAITS) == sorted(pauses)


def test_json_of_one_long_line_and_many_short_ones_is_the_same(tmp_path):
    texts = ["a " * 200_000, "b"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert list(read_file(tmp_path / "a.jsonl")) == texts
