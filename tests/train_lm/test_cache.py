"""The cache: made once, whole or not there, the same for everybody, and never trusted blindly."""

import errno
import json
import os
import signal
import socket
import time
from functools import partial
from itertools import count, islice
from multiprocessing import get_context

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.files import sha256_file
from hf_ibnorm.data.tokens import Encoder
from train_lm.cache import Cache, encode_all
from train_lm.corpus import Files, HeldOut
from train_lm.progress import with_progress
from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

TEXTS = [f"Document {i}: {'it was a truth ' * (i % 7)}— é 日本 😀\r\n" for i in range(400)] + ["", "last"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Many chunks of the few texts."""
    monkeypatch.setattr("train_lm.cache.CHUNK", 1000)


@pytest.fixture(scope="module")
def tokenizer():
    return wrap_tokenizer(train_tokenizer(TEXTS, 300), 64)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer)


@pytest.fixture(scope="module")
def expected(encoder):
    return encoder.documents(TEXTS)


@pytest.fixture
def cache(tmp_path):
    return Cache(str(tmp_path / "cache"))


class Unreadable:
    """Documents that nobody may read."""

    def __iter__(self):
        raise AssertionError("read although the cache has them")


def word_tokenizer(vocabulary):
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def words(size):
    return {"<eos>": 0, **{f"w{i}": i for i in range(1, size)}}


def entry(cache):
    """The one entry of tokens."""
    (folder,) = entries(cache)
    return folder


def entries(cache):
    """What a run would look for, finished or not."""
    return [path for path in cache.folder.glob("tokens-*") if path.suffix != ".lock"]


def temporary(cache):
    return [path for path in cache.folder.iterdir() if path.name.startswith(".")]


def in_processes(number, act):
    """Exit codes of `number` processes that run `act` at once."""
    context = get_context("fork")
    started = context.Barrier(number)

    def run():
        started.wait(timeout=60)
        act()

    processes = [context.Process(target=run) for _ in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def same_tokens(tokens, expected):
    return tokens.dtype.newbyteorder("=") == np.uint16 and np.array_equal(tokens, expected)


def test_tokens_are_those_of_every_document_in_order_each_with_its_end(cache, encoder, tokenizer, expected):
    tokens = cache.tokens("key", encoder, TEXTS, 2)
    np.testing.assert_array_equal(tokens, expected)
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    starts = [0, *(ends[:-1] + 1)]
    assert [tokenizer.decode(tokens[a:b]) for a, b in zip(starts, ends, strict=True)] == TEXTS


def test_tokens_are_made_once_and_mapped_into_memory(cache, encoder, expected):
    first = cache.tokens("key", encoder, iter(TEXTS), 1)
    for tokens in (first, cache.tokens("key", encoder, Unreadable(), 1)):
        assert isinstance(tokens, np.memmap)
        assert same_tokens(tokens, expected)
        with pytest.raises(ValueError, match="read-only"):
            tokens[0] = 1
    again = Cache(str(cache.folder)).tokens("key", encoder, Unreadable(), 3)
    assert same_tokens(again, expected)
    assert not temporary(cache)


def test_another_text_or_tokenizer_is_another_entry(cache, encoder, tokenizer):
    other = Encoder(wrap_tokenizer(train_tokenizer(TEXTS, 280), 64))
    cache.tokens("a", encoder, ["text of a"], 1)
    cache.tokens("b", encoder, ["text of b"], 1)
    cache.tokens("a", other, ["other tokens"], 1)
    assert tokenizer.decode(cache.tokens("a", encoder, Unreadable(), 1)[:-1]) == "text of a"
    assert tokenizer.decode(cache.tokens("b", encoder, Unreadable(), 1)[:-1]) == "text of b"
    assert other.tokenizer.decode(cache.tokens("a", other, Unreadable(), 1)[:-1]) == "other tokens"


@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_number_of_threads_does_not_change_the_tokens(cache, encoder, expected, threads):
    assert same_tokens(cache.tokens("key", encoder, TEXTS, threads), expected)
    np.testing.assert_array_equal(np.concatenate(list(encode_all(encoder, iter(TEXTS), threads))), expected)


def test_no_more_documents_are_read_ahead_than_keep_the_threads_busy(encoder):
    met = []
    endless = (met.append(i) or "x" * 99 for i in count())
    assert len(list(islice(encode_all(encoder, endless, 2), 3))) == 3
    assert len(met) <= (3 + 2 * 2) * 10


@pytest.mark.parametrize(("size", "dtype"), [(300, "<u2"), (1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_tokens_take_two_bytes_until_the_vocabulary_needs_four(cache, size, dtype):
    tokenizer = word_tokenizer(words(size))
    assert len(tokenizer) == size
    encoder = Encoder(tokenizer)
    tokens = cache.tokens("key", encoder, [f"w1 w{size - 1}"], 1)
    assert tokens.dtype.str == dtype
    assert tokens.tolist() == [1, size - 1, 0]


def test_tokens_beyond_the_size_of_the_vocabulary_are_kept_whole(cache):
    """A vocabulary with gaps has ids above its size."""
    encoder = Encoder(word_tokenizer({"<eos>": 0, "low": 1, "high": 70_000}))
    assert cache.tokens("key", encoder, ["low high"], 1).tolist() == [1, 70_000, 0]


@pytest.mark.parametrize("documents", [[], iter(())])
def test_a_corpus_without_documents_is_a_user_error_and_no_entry(cache, encoder, documents):
    with pytest.raises(UserError, match="^corpus: "):
        cache.tokens("key", encoder, documents, 1)
    assert not entries(cache)
    assert not temporary(cache)


def test_a_corpus_of_empty_documents_has_their_ends(cache, encoder, tokenizer):
    assert cache.tokens("key", encoder, ["", ""], 1).tolist() == [tokenizer.eos_token_id] * 2


def flip(raw, place):
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


@pytest.mark.parametrize("file", ["tokens.bin", "meta.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: raw + b"\x00\x00",
        lambda raw: flip(raw, len(raw) // 2),
        lambda raw: flip(raw, len(raw) - 2),
        lambda raw: bytes(len(raw)),
        lambda raw: b"[1, 2]",
        lambda raw: b"null",
        None,
    ],
)
def test_a_damaged_entry_is_made_anew(cache, encoder, expected, file, damage):
    cache.tokens("key", encoder, TEXTS, 1)
    path = entry(cache) / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    assert same_tokens(cache.tokens("key", encoder, TEXTS, 1), expected)
    assert same_tokens(cache.tokens("key", encoder, Unreadable(), 1), expected)
    assert not temporary(cache)


def test_no_wrong_bit_in_what_is_noted_about_tokens_makes_them_others(cache, encoder):
    expected = cache.tokens("key", encoder, ["a short text"], 1).copy()
    path = entry(cache) / "meta.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << (0, 1, 4)[place % 3]]) + whole[place + 1 :])
        tokens = cache.tokens("key", encoder, ["a short text"], 1)
        assert same_tokens(tokens, expected), path.read_bytes()


def test_an_entry_without_its_files_is_made_anew(cache, encoder, expected):
    cache.tokens("key", encoder, TEXTS, 1)
    for file in entry(cache).iterdir():
        file.unlink()
    assert same_tokens(cache.tokens("key", encoder, TEXTS, 1), expected)
    assert same_tokens(cache.tokens("key", encoder, Unreadable(), 1), expected)


def test_of_tokens_too_many_to_hash_the_number_is_checked(cache, encoder, expected, monkeypatch):
    monkeypatch.setattr("train_lm.cache.VERIFIED", 0)
    assert same_tokens(cache.tokens("key", encoder, TEXTS, 1), expected)
    monkeypatch.setattr("train_lm.cache.sha256_file", Unreadable)
    assert same_tokens(cache.tokens("key", encoder, Unreadable(), 1), expected)
    path = entry(cache) / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert same_tokens(cache.tokens("key", encoder, TEXTS, 1), expected)


def test_a_map_that_is_in_use_outlives_the_making_anew(cache, encoder, expected):
    tokens = cache.tokens("key", encoder, TEXTS, 1)
    (entry(cache) / "meta.json").unlink()
    cache.tokens("key", encoder, TEXTS, 1)
    assert same_tokens(tokens, expected)


@pytest.mark.parametrize("error", [UserError("corpus: a.jsonl, line 7 is no JSON"), KeyboardInterrupt(), ValueError()])
def test_a_build_that_fails_leaves_nothing_and_a_later_one_succeeds(cache, encoder, expected, error):
    def failing():
        yield from TEXTS[:-2]
        raise error

    with pytest.raises(type(error)) as caught:
        cache.tokens("key", encoder, failing(), 2)
    assert caught.value is error
    assert not entries(cache)
    assert not temporary(cache)
    assert same_tokens(cache.tokens("key", encoder, TEXTS, 2), expected)


def test_a_full_disk_is_one_line_that_names_the_cache_and_leaves_nothing(cache, encoder, expected, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("train_lm.cache.write_text", full)
        with pytest.raises(UserError) as caught:
            cache.tokens("key", encoder, TEXTS, 1)
        with pytest.raises(UserError, match="No space left"):
            cache.text("kind", ["key"], lambda: "made")
    (line,) = str(caught.value).splitlines()
    assert all(word in line for word in ("cache_dir", str(cache.folder), "No space left"))
    assert not entries(cache)
    assert not temporary(cache)
    assert same_tokens(cache.tokens("key", encoder, TEXTS, 1), expected)


def killed_in_documents(patch):
    def documents():
        yield from TEXTS[:-2]
        os.kill(os.getpid(), signal.SIGKILL)

    return documents()


def killed_before_the_note(patch):
    patch.setattr("train_lm.cache.write_text", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    return TEXTS


def killed_before_the_rename(patch):
    patch.setattr("os.rename", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    return TEXTS


@pytest.mark.parametrize("kill", [killed_in_documents, killed_before_the_note, killed_before_the_rename])
def test_a_build_that_is_killed_leaves_no_entry_and_a_later_one_succeeds(cache, encoder, expected, monkeypatch, kill):
    def build():
        cache.tokens("key", encoder, kill(monkeypatch), 1)

    assert in_processes(1, build) == [-signal.SIGKILL]
    assert not entries(cache)
    assert same_tokens(cache.tokens("key", encoder, TEXTS, 1), expected)
    assert same_tokens(cache.tokens("key", encoder, Unreadable(), 1), expected)


def test_what_a_killed_build_left_is_removed_by_the_next_one(cache, encoder, monkeypatch):
    """It may be as large as the corpus."""
    in_processes(1, lambda: cache.tokens("key", encoder, killed_in_documents(monkeypatch), 1))
    assert temporary(cache)
    cache.tokens("key", encoder, TEXTS, 1)
    assert not temporary(cache)


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_want_the_same_tokens_at_once_read_the_documents_once(
    cache, encoder, expected, tmp_path, damaged
):
    log = tmp_path / "log"

    def documents():
        with log.open("a") as file:
            file.write("read\n")
        yield from TEXTS

    def build():
        assert same_tokens(cache.tokens("key", encoder, documents(), 1), expected)

    if damaged:
        cache.tokens("key", encoder, TEXTS, 1)
        (entry(cache) / "tokens.bin").write_bytes(b"")
    assert in_processes(4, build) == [0] * 4
    assert log.read_text() == "read\n"
    assert not temporary(cache)


def test_a_process_that_waits_makes_what_a_killed_one_did_not(cache, encoder, expected, tmp_path):
    """The first to open the marker is killed in the middle of its build; all the others get their tokens."""
    marker = tmp_path / "marker"

    def documents():
        yield from TEXTS[:200]
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            yield from TEXTS[200:]
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def build():
        assert same_tokens(cache.tokens("key", encoder, documents(), 1), expected)

    assert sorted(in_processes(3, build)) == [-signal.SIGKILL, 0, 0]
    assert same_tokens(cache.tokens("key", encoder, Unreadable(), 1), expected)


@pytest.mark.parametrize("below", ["", "/cache", "/deep/er"])
def test_a_folder_that_cannot_be_used_is_one_line_that_names_it(tmp_path, below):
    (tmp_path / "file").write_text("no folder")
    folder = f"{tmp_path / 'file'}{below}"
    with pytest.raises(UserError) as caught:
        Cache(folder)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"cache_dir: {folder} cannot be used")


def test_a_folder_that_is_gone_or_became_a_file_is_one_line_that_names_it(cache, encoder):
    cache.folder.rmdir()
    cache.folder.write_text("no folder")
    for act in (
        lambda: cache.tokens("key", encoder, TEXTS, 1),
        lambda: cache.text("kind", ["key"], lambda: "made"),
    ):
        with pytest.raises(UserError) as caught:
            act()
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"cache_dir: {cache.folder} cannot be used")


def test_trouble_with_the_documents_is_not_blamed_on_the_cache(cache, encoder, tokenizer):
    def unreachable():
        yield "first"
        raise ConnectionError("the host of the dataset cannot be reached")

    def make():
        raise ConnectionError("the host of the dataset cannot be reached")

    for act in (
        lambda: cache.tokens("key", encoder, unreachable(), 1),
        lambda: cache.text("tokenizer", ["key"], make),
    ):
        with pytest.raises((ConnectionError, UserError), match="cannot be reached") as caught:
            act()
        assert "cache_dir" not in str(caught.value)
    assert not entries(cache)


def test_a_file_that_cannot_be_read_is_not_blamed_on_the_cache(cache, tmp_path):
    """A folder stands for it: tests may run as root, who may read every file."""
    (tmp_path / "a.txt").mkdir()
    with pytest.raises((OSError, UserError), match=r"a\.txt") as caught:
        cache.file_sha(tmp_path / "a.txt")
    assert "cache_dir" not in str(caught.value)


def test_the_folder_is_the_one_asked_for_or_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HF_IBNORM_CACHE", str(tmp_path / "ours"))
    assert Cache("~/mine").folder == tmp_path / "home" / "mine"
    assert Cache(None).folder == tmp_path / "ours"
    monkeypatch.delenv("HF_IBNORM_CACHE")
    assert Cache(None).folder == tmp_path / "xdg" / "hf_ibnorm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Cache(None).folder == tmp_path / "home" / ".cache" / "hf_ibnorm"
    assert Cache(None).folder.is_dir()


def test_a_hash_of_a_file_is_computed_once_until_the_file_changes(cache, tmp_path, monkeypatch):
    hashed = []

    def hash_file(path):
        hashed.append(path)
        return sha256_file(path)

    monkeypatch.setattr("train_lm.cache.sha256_file", hash_file)
    monkeypatch.setattr("train_lm.cache.SETTLED", 0)
    path = tmp_path / "a.txt"
    path.write_text("first")
    os.utime(path, ns=(1, 1))
    first = cache.file_sha(path)
    assert cache.file_sha(path) == Cache(str(cache.folder)).file_sha(path) == first == sha256_file(path)
    assert hashed == [path]
    path.write_text("second")  # another length
    os.utime(path, ns=(1, 1))
    assert cache.file_sha(path) == sha256_file(path) != first
    path.write_text("SECOND")  # another time
    os.utime(path, ns=(2, 2))
    assert cache.file_sha(path) == sha256_file(path)
    (tmp_path / "new").write_text("third!")  # another file
    os.utime(tmp_path / "new", ns=(2, 2))
    os.replace(tmp_path / "new", path)
    assert cache.file_sha(path) == sha256_file(path)
    assert len(hashed) == 4
    path.rename(tmp_path / "moved.txt")
    assert cache.file_sha(tmp_path / "moved.txt") == sha256_file(tmp_path / "moved.txt")


@pytest.mark.parametrize("settled", [0, 3 * 10**9])
def test_a_file_of_the_same_size_inode_and_time_is_hashed_anew_where_its_content_is_another(
    cache, tmp_path, monkeypatch, settled
):
    monkeypatch.setattr("train_lm.cache.SETTLED", settled)
    path = tmp_path / "a.txt"
    for i in range(5):
        if not settled:
            time.sleep(0.02)  # until the clock of the file system has moved on
        with path.open("w") as file:
            file.write(f"text {i}")
        os.utime(path, ns=(1, 1))
        assert cache.file_sha(path) == sha256_file(path)


def test_a_file_that_changes_between_its_hash_and_its_tokens_gives_no_entry(cache, encoder, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    documents = Files([path], "text", cache.file_sha)
    time.sleep(0.02)
    path.write_text("after!")
    os.utime(path, ns=(1, 1))
    for each in (documents, HeldOut(documents, 2, rest=False)):
        with pytest.raises(UserError, match=r"a\.txt has changed while it was read"):
            cache.tokens(each.fingerprint, encoder, each, 1)
    assert not entries(cache)


def test_who_waits_for_a_lock_hears_for_whom(cache, monkeypatch):
    monkeypatch.setattr("train_lm.cache.WAITED", (0.05, 0.1))
    context = get_context("fork")
    begun, go_on = context.Event(), context.Event()

    def make():
        begun.set()
        assert go_on.wait(60)
        return "made"

    other = context.Process(target=lambda: cache.text("kind", ["key"], make))
    other.start()
    assert begun.wait(60)
    said = []

    def say(text):
        said.append(text)
        if len(said) == 2:
            go_on.set()

    assert Cache(str(cache.folder), say).text("kind", ["key"], lambda: "made again") == "made"
    other.join()
    assert f"waiting for process {other.pid} on {socket.gethostname()}, since 2" in said[0]
    assert not temporary(cache)


def test_documents_that_cannot_be_read_are_left_out_only_where_that_is_allowed_even_from_the_cache(
    cache, encoder, tmp_path
):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"te\n{"text": "two"}\n{"text": 3}\n{"text": "\xff"}\n{"text": "three"}\n')

    def tokens(allowed):
        documents = Files([path], "text", allowed=allowed)
        return cache.tokens(documents.fingerprint, encoder, documents, 1), documents.bad

    with pytest.raises(UserError, match=r"a\.jsonl, line 2, is no JSON.*max_bad_documents.* is 0"):
        tokens(0)
    with pytest.raises(UserError, match=r"a\.jsonl, line 5, cannot be read.*max_bad_documents.* is 2"):
        tokens(2)
    for _ in range(2):
        found, bad = tokens(3)
        np.testing.assert_array_equal(found, encoder.documents(["one", "two", "three"]))
        assert bad["count"] == 3
        assert "line 2" in bad["first"]
    with pytest.raises(UserError, match=r"a\.jsonl, line 2, is no JSON.*max_bad_documents.* is 2"):
        tokens(2)


def test_tokenizing_says_how_far_it_is(tmp_path, encoder, monkeypatch):
    said = []
    monkeypatch.setattr("train_lm.cache.with_progress", partial(with_progress, first=0.0, every=0.0))
    Cache(str(tmp_path), said.append).tokens("key", encoder, ["word " * 200_000] * 3, 1)
    assert [line.partition(" MB of text,")[0] for line in said] == [
        f"tokenizing: {i} documents, {i}" for i in (1, 2, 3)
    ]


def test_text_is_made_once_for_each_kind_and_key(cache):
    made = []

    def make(text):
        made.append(text)
        return text

    wanted = {("a", "bc"): "1", ("ab", "c"): "", ("a", "b", "c"): "é日本😀\x00\u2028\r\n", ("abc",): '{"text": "1"}'}
    for _ in range(2):
        for key, text in wanted.items():
            for kind in ("tokenizer", "other"):
                assert cache.text(kind, key, lambda text=kind + text: make(text)) == kind + text
    assert len(made) == len(set(made)) == 8
    assert not temporary(cache)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: b"",
        lambda raw: raw.replace(b"made", b"fake"),
        lambda raw: b"\xff" + raw,
        lambda raw: b"null",
        lambda raw: b"[]",
        lambda raw: b"{}",
        lambda raw: json.dumps({"text": 1, "sha256": ""}).encode(),
    ],
)
def test_damaged_text_is_made_anew(cache, damage):
    cache.text("kind", ["key"], lambda: "made")
    (path,) = cache.folder.glob("kind-*.json")
    path.write_bytes(damage(path.read_bytes()))
    assert cache.text("kind", ["key"], lambda: "made anew") == "made anew"
    assert cache.text("kind", ["key"], lambda: "never") == "made anew"


def test_text_that_cannot_be_made_is_made_the_next_time(cache):
    def fail():
        raise UserError("corpus: damaged")

    with pytest.raises(UserError, match="^corpus: damaged$"):
        cache.text("kind", ["key"], fail)
    assert cache.text("kind", ["key"], lambda: "made") == "made"
    assert not temporary(cache)


def test_processes_that_want_the_same_text_at_once_make_it_once(cache, tmp_path):
    log = tmp_path / "log"

    def make():
        with log.open("a") as file:
            file.write("made\n")
        return "text"

    def build():
        assert cache.text("kind", ["key"], make) == "text"

    assert in_processes(4, build) == [0] * 4
    assert log.read_text() == "made\n"
