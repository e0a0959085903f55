"""Streams: every document once a pass, in an order that the seed gives, and gone on with to the bit from anywhere."""

import gzip
import json
import time
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset

from hf_ibnorm.base.errors import TryAgain, UserError
from hf_ibnorm.base.files import sha256_file
from hf_ibnorm.data.tokens import Encoder
from train_lm.corpus import CorpusOptions, Files, Named, Texts, open_corpus
from train_lm.data import StepShape, StreamedData
from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

TEXTS = [f"{i}: {'it was ' * (i % 5)}— é 日本\r\n" for i in range(35)] + ["", "last"]
FILES = {"a": TEXTS[:11], "b": TEXTS[11:12], "c": TEXTS[12:30], "d": TEXTS[30:]}
BLOCK = 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A pass of several chunks, read ahead of several batches."""
    monkeypatch.setattr("train_lm.cache.CHUNK", 60)


@pytest.fixture(scope="module")
def tokenizer():
    return wrap_tokenizer(train_tokenizer(TEXTS, 300), 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The texts as every kind of source."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, texts in FILES.items():
        write_jsonl(folder / f"{name}.jsonl", texts)
        write_parquet(folder / f"{name}.parquet", texts)
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.txt").write_bytes(text.encode())
    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved", num_shards=3)
    return folder


def write_jsonl(path, texts):
    path.write_bytes("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    return path


def write_parquet(path, texts):
    pq.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), path, row_group_size=4)
    return path


def opened(name):
    return open_corpus(str(name), "train", "train", CorpusOptions(None, "text", True, sha256_file))


def loaded(paths):
    """A dataset of the hub, as far as the `datasets` library is concerned."""
    files = [str(path) for path in paths]
    return Named(load_dataset("parquet", data_files=files, split="train", streaming=True), "text")


SOURCES = {
    "jsonl": lambda folder: opened(folder / "*.jsonl"),
    "parquet": lambda folder: opened(folder / "*.parquet"),
    "txt": lambda folder: opened(folder / "*.txt"),
    "embedded": lambda folder: Texts(TEXTS),
    "hub": lambda folder: loaded(sorted(folder.glob("*.parquet"))),
    "saved": lambda folder: opened(folder / "saved"),
}


@pytest.fixture
def stream(tokenizer):
    """Factory of streams, closed when the test is over."""
    opened = []

    def make(documents, shape=None, state=None, seed=0, buffer=7, threads=2, block_size=BLOCK):
        shape = shape or StepShape(2, 2)
        opened.append(StreamedData(documents, Encoder(tokenizer), block_size, seed, buffer, threads, shape))
        if state is not None:
            opened[-1].load_state(json.loads(state))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def tokens_of(batch):
    """Inputs and targets of a batch, in the order of the stream."""
    return [torch.cat([part[i].flatten() for part in batch.parts]) for i in range(2)]


def documents_of(data, number):
    """The first `number` documents of a stream, from its tokens."""
    eos, met, ids = data.encoder.tokenizer.eos_token_id, [], []
    while len(met) < number:
        for token in tokens_of(data.next())[1].tolist():
            if token == eos:
                met.append(data.encoder.tokenizer.decode(ids))
                ids = []
            else:
                ids.append(token)
    return met[:number]


def passes_of(data, size, number):
    """The first passes over `size` documents."""
    documents = iter(documents_of(data, size * number))
    return [list(islice(documents, size)) for _ in range(number)]


def facts(batch):
    """All that a batch says, to be compared."""
    return [tokens_of(batch)[i].tolist() for i in range(2)], len(batch.parts), batch.tokens, batch.sha


def following(data, number):
    return [facts(data.next()) for _ in range(number)]


def states_and_batches(data, number):
    """Before each batch the state as JSON has it, and the batches."""
    states, batches = [], []
    for _ in range(number):
        states.append(json.dumps(data.state()))
        batches.append(facts(data.next()))
    return states, batches


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("buffer", [1, 7, 1000])
def test_each_pass_gives_every_document_once(folder, stream, source, buffer):
    texts = [text for text in TEXTS if text or source != "txt"]  # an empty text file is no document
    passes = passes_of(stream(SOURCES[source](folder), buffer=buffer), len(texts), 4)
    assert all(sorted(each) == sorted(texts) for each in passes)
    if buffer > 1:
        assert len({tuple(each) for each in passes}) == len(passes), "another order each pass"


@pytest.mark.parametrize("source", ["embedded", "saved", "hub"])
def test_a_buffer_of_one_keeps_the_order_of_the_source(folder, stream, source):
    assert passes_of(stream(SOURCES[source](folder), buffer=1), len(TEXTS), 2) == [TEXTS, TEXTS]


def test_files_come_in_another_order_each_pass_even_with_a_buffer_of_one(folder, stream):
    passes = passes_of(stream(SOURCES["jsonl"](folder), buffer=1), len(TEXTS), 6)
    assert len({tuple(each) for each in passes}) > 2
    for each in passes:
        for texts in FILES.values():
            start = each.index(texts[0])
            assert each[start : start + len(texts)] == texts


@pytest.mark.parametrize("source", SOURCES)
def test_order_depends_on_the_seed_and_not_on_the_number_of_threads(folder, stream, source):
    def batches(**options):
        return following(stream(SOURCES[source](folder), **options), 12)

    first = batches(seed=3, threads=1)
    assert batches(seed=3, threads=2) == batches(seed=3, threads=7) == first
    assert batches(seed=4, threads=1) != first


def test_a_buffer_holds_no_more_characters_than_it_may(folder, stream, monkeypatch):
    monkeypatch.setattr("train_lm.data.BUFFER_CHARACTERS", 100)
    data = stream(SOURCES["jsonl"](folder), buffer=1000)
    states, batches = states_and_batches(data, 20)
    longest = max(map(len, TEXTS))
    assert max(sum(map(len, json.loads(state)["buffer"])) for state in states) < 100 + longest
    for k, state in enumerate(states):
        assert following(stream(SOURCES["jsonl"](folder), state=state, buffer=1000), 5)[: 20 - k] == batches[k : k + 5]
    assert sorted(documents_of(stream(SOURCES["jsonl"](folder), buffer=1000), len(TEXTS))) == sorted(TEXTS)


def even_files(folder, number, kind):
    """Files of five documents each, which no two share."""
    texts = [[f"file {file}, document {i}" for i in range(5)] for file in range(number)]
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[kind]
    return [write(folder / f"{file}.{kind}", each) for file, each in enumerate(texts)], sorted(chain(*texts))


@pytest.mark.parametrize("source", ["jsonl", "hub", "embedded", "saved"])
@pytest.mark.parametrize(("files", "processes"), [(4, 2), (3, 2), (1, 2), (3, 3), (4, 3), (2, 3)])
def test_processes_share_the_documents_of_a_pass_without_loss_or_overlap(tmp_path, stream, source, files, processes):
    paths, texts = even_files(tmp_path, files, "jsonl" if source == "jsonl" else "parquet")
    if source == "saved":
        Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved", num_shards=2)
    make = {
        "jsonl": lambda: Files(paths, "text"),
        "hub": lambda: loaded(paths),
        "embedded": lambda: Texts(texts),
        "saved": lambda: opened(tmp_path / "saved"),
    }[source]
    shares = [len(texts[process::processes]) for process in range(processes)]
    parts = [
        passes_of(stream(make(), StepShape(1, 1, processes, process)), shares[process], 3)
        for process in range(processes)
    ]
    for each in zip(*parts, strict=True):
        assert sorted(chain(*each)) == texts


def test_processes_shuffle_their_parts_each_in_its_own_way(stream):
    texts = [str(i % 10) for i in range(20)]
    same = [documents_of(stream(Texts(sorted(texts)), StepShape(1, 1, 2, process)), 10) for process in (0, 1)]
    assert sorted(same[0]) == sorted(same[1])
    assert same[0] != same[1]


@pytest.mark.parametrize(
    ("source", "processes", "buffer"),
    [*((source, processes, 7) for source in SOURCES for processes in (1, 2)), ("jsonl", 3, 1), ("hub", 3, 1)],
)
def test_from_every_state_the_same_batches_follow(folder, stream, source, processes, buffer):
    """Fifteen batches are more than two passes; the eight that follow a state are more than one."""
    shape = StepShape(2, 2, processes, processes - 1)

    def make(state=None):
        return stream(SOURCES[source](folder), shape, state, buffer=buffer)

    states, batches = states_and_batches(make(), 23)
    for k in range(16):
        assert following(make(states[k]), 8) == batches[k : k + 8], f"after {k} batches"


def test_from_every_state_the_same_batches_follow_where_the_buffer_holds_the_corpus(folder, stream):
    states, batches = states_and_batches(stream(SOURCES["jsonl"](folder), buffer=1000), 23)
    for k in range(16):
        resumed = stream(SOURCES["jsonl"](folder), state=states[k], buffer=1000)
        assert following(resumed, 8) == batches[k : k + 8], f"after {k} batches"


@pytest.mark.parametrize("source", ["jsonl", "hub"])
@pytest.mark.parametrize("between", [0, 1, 2])
@pytest.mark.parametrize("chunk", [60, 700])
def test_a_state_taken_soon_after_another_was_loaded_is_as_good(folder, stream, source, between, chunk, monkeypatch):
    """Soon: perhaps before anything was read anew, as a larger chunk is enough for several batches."""
    monkeypatch.setattr("train_lm.cache.CHUNK", chunk)
    states, batches = states_and_batches(stream(SOURCES[source](folder)), 28)
    for k in range(0, 12, 2):
        second = stream(SOURCES[source](folder), state=states[k])
        assert following(second, between) == batches[k : k + between]
        third = stream(SOURCES[source](folder), state=json.dumps(second.state()))
        assert following(third, 14) == batches[k + between : k + between + 14], f"after {k} and {between} batches"


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_stopped_after_every_batch_is_one_never_stopped(folder, stream, source, monkeypatch):
    monkeypatch.setattr("train_lm.cache.CHUNK", 300)
    _, batches = states_and_batches(stream(SOURCES[source](folder)), 20)
    state, met = None, []
    for _ in batches:
        data = stream(SOURCES[source](folder), state=state)
        met += following(data, 1)
        state = json.dumps(data.state())
    assert met == batches


def test_threads_may_be_others_after_a_resume(folder, stream):
    states, batches = states_and_batches(stream(SOURCES["jsonl"](folder), threads=1), 20)
    for k in (1, 7, 12):
        assert following(stream(SOURCES["jsonl"](folder), state=states[k], threads=5), 8) == batches[k : k + 8]


def test_with_chunks_of_their_own_size_streams_resume_as_well(stream, monkeypatch):
    monkeypatch.undo()
    texts = [f"{i} " * 2000 for i in range(200)]
    states, batches = states_and_batches(stream(Texts(texts), StepShape(4, 8), block_size=512), 22)
    for k in (1, 9, 17):
        resumed = stream(Texts(texts), StepShape(4, 8), states[k], block_size=512)
        assert following(resumed, 22 - k) == batches[k:]


def test_asking_for_the_state_changes_nothing_and_it_stays_as_it_was(folder, stream):
    asked, unasked = stream(SOURCES["jsonl"](folder)), stream(SOURCES["jsonl"](folder))
    states, batches = [], []
    for _ in range(15):
        states.append((asked.state(), json.dumps(asked.state())))
        batches.append(facts(asked.next()))
    assert batches == following(unasked, 15)
    assert all(json.dumps(state) == then for state, then in states)


def test_a_state_may_be_loaded_any_number_of_times(folder, stream):
    states, batches = states_and_batches(stream(SOURCES["jsonl"](folder)), 20)
    state = json.loads(states[6])
    for _ in range(2):
        data = stream(SOURCES["jsonl"](folder))
        data.load_state(state)
        assert following(data, 14) == batches[6:]
        assert state == json.loads(states[6])


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [(StepShape(1, 1), 1), (StepShape(3, 1), 5), (StepShape(2, 4), 7), (StepShape(1, 2, 2, 1), 300)],
)
def test_every_token_is_predicted_once_and_batches_join(stream, shape, block_size):
    data = stream(Texts(TEXTS), shape, block_size=block_size)
    batches = [data.next() for _ in range(9)]
    for batch in batches:
        assert len(batch.parts) == shape.micro_batches
        for tensor in (tensor for part in batch.parts for tensor in part):
            assert tensor.shape == (shape.per_device, block_size)
            assert tensor.dtype == torch.int64
        assert batch.tokens == shape.sequences * block_size
    inputs, targets = (torch.cat(each) for each in zip(*map(tokens_of, batches), strict=True))
    assert inputs[0] == data.encoder.tokenizer.eos_token_id, "as if a document had ended before the first"
    assert torch.equal(inputs[1:], targets[:-1])


def test_targets_are_the_tokens_of_the_documents(stream, tokenizer):
    targets = torch.cat([tokens_of(batch)[1] for batch in islice(endless(stream(Texts(TEXTS), buffer=1)), 40)]).numpy()
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    one_pass = np.concatenate(ids).astype(np.int64)
    assert len(targets) > 2 * len(one_pass)
    np.testing.assert_array_equal(targets, np.resize(one_pass, len(targets)))


def endless(data):
    while True:
        yield data.next()


def test_sha_tells_batches_apart(stream):
    first, other = (following(stream(Texts(TEXTS), seed=seed), 20) for seed in (0, 1))
    by_sha = {sha: tokens for tokens, *_, sha in first + other}
    assert len(by_sha) == len({str(tokens) for tokens, *_ in first + other}) > 20


def test_one_document_longer_than_many_batches_is_given_again_and_again(stream):
    text = "a long one, " * 500
    assert documents_of(stream(Texts([text]), buffer=3), 3) == [text] * 3


@pytest.mark.parametrize("buffer", [1, 7])
@pytest.mark.parametrize(("texts", "process", "processes"), [([], 0, 1), (["only one"], 1, 2), (["one", "two"], 2, 3)])
def test_a_part_without_documents_is_one_line(tmp_path, stream, texts, process, processes, buffer):
    sources = [Texts(texts), Files([write_jsonl(tmp_path / "a.jsonl", texts)], "text")]
    if texts:
        sources.append(loaded([write_parquet(tmp_path / "a.parquet", texts)]))
    for documents in sources:
        with pytest.raises(UserError) as caught:
            stream(documents, StepShape(1, 1, processes, process), buffer=buffer).next()
        (line,) = str(caught.value).splitlines()
        assert f"process {process} of {processes}" in line


def test_the_processes_that_have_documents_do_not_mind_one_that_has_none(stream):
    assert documents_of(stream(Texts(["only one"]), StepShape(1, 1, 2, 0)), 2) == ["only one"] * 2


def broken_line(path, raw):
    path.write_bytes(raw.replace(b'{"text": "28: ', b'{"text": 28, "'))


def cut_off(path, raw):
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(raw)[:-30])
    path.unlink()


def half_of_a_pair(path, raw):
    path.write_bytes(raw.replace(b'"28: ', rb'"\udc80: '))


@pytest.mark.parametrize(
    ("damage", "words"), [(broken_line, "c.jsonl, line 17"), (cut_off, "c.jsonl.gz"), (half_of_a_pair, "line 17")]
)
def test_a_damaged_file_ends_the_stream_where_it_is_met_with_one_line_that_names_it(tmp_path, stream, damage, words):
    for name, texts in FILES.items():
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    damage(tmp_path / "c.jsonl", (tmp_path / "c.jsonl").read_bytes())
    data = stream(Files(sorted(tmp_path.iterdir()), "text"), StepShape(1, 1), buffer=1)
    met = []
    with pytest.raises(UserError, match=words) as caught:
        met.extend(batch.tokens for batch in islice(endless(data), 1000))
    assert len(str(caught.value).splitlines()) == 1
    assert met, "what is whole was read"


@pytest.mark.parametrize("make", [lambda paths: Files(paths, "text"), loaded], ids=["files", "hub"])
def test_damaged_parquet_met_in_a_stream_is_one_line(tmp_path, stream, make):
    paths, _ = even_files(tmp_path, 3, "parquet")
    data = stream(make(paths), buffer=1)
    paths[2].write_bytes(paths[2].read_bytes()[:-50])
    with pytest.raises(UserError) as caught:
        documents_of(data, 16)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("make", [lambda paths: Files(paths, "text"), loaded], ids=["files", "hub"])
def test_a_file_that_disappears_ends_the_stream_with_one_line(tmp_path, stream, make):
    paths, _ = even_files(tmp_path, 3, "parquet")
    data = stream(make(paths), buffer=1)
    paths[1].unlink()
    with pytest.raises(UserError, match=r"1\.parquet") as caught:
        documents_of(data, 16)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("source", ["hub", "saved"])
def test_rows_of_a_dataset_without_text_are_one_line(tmp_path, stream, source):
    rows = ["first", None, "third"]
    if source == "hub":
        documents = loaded([write_parquet(tmp_path / "a.parquet", rows)])
    else:
        Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "saved")
        documents = opened(tmp_path / "saved")
    with pytest.raises(UserError, match="^text_field: ") as caught:
        documents_of(stream(documents, buffer=1), 3)
    assert len(str(caught.value).splitlines()) == 1


def bad_lines(path, rows):
    """A file of one text a line; where that is None, a line that is no JSON."""
    path.write_text("\n".join('{"text": "cut off' if row is None else json.dumps({"text": row}) for row in rows))
    return path


@pytest.mark.parametrize("buffer", [1, 7])
@pytest.mark.parametrize("processes", [1, 2])
def test_documents_that_cannot_be_read_are_left_out_and_counted_in_each_pass_anew(tmp_path, stream, buffer, processes):
    rows = [None, *(f"text {i}" for i in range(7)), None, *(f"text {i}" for i in range(7, 20)), None]
    path = bad_lines(tmp_path / "a.jsonl", rows)

    def make(state=None, allowed=3):
        documents = Files([path], "text", allowed=allowed)
        return [stream(documents, StepShape(1, 1, processes, i), state, buffer=buffer) for i in range(processes)]

    shares = [[row for row in rows[i::processes] if row is not None] for i in range(processes)]
    for share, each in zip(shares, make(), strict=True):
        assert sorted(documents_of(each, 3 * len(share))) == sorted(3 * share)
    first = make()[0]
    states, batches = states_and_batches(first, 23)
    met = [first.next().bad for _ in range(40)]
    assert sorted(met) == met
    assert met[-1] > 3, "several passes"
    for k in (0, 5, 12):
        (resumed, *_) = make(states[k])
        assert following(resumed, 8) == batches[k : k + 8]
        assert [resumed.next().bad for _ in range(23 - k - 8 + 40)][-40:] == met
    if processes == 1:
        with pytest.raises(UserError, match=r"a\.jsonl, line \d+, is no JSON.*max_bad_documents, .* is 2"):
            documents_of(make(allowed=2)[0], 60)


@pytest.mark.parametrize("damage", [broken_line, half_of_a_pair])
def test_the_state_before_a_bad_document_is_one_to_go_on_from(tmp_path, stream, damage):
    """The run can be resumed as soon as the document may be left out; it is the run that left it out from the start."""
    for name, texts in FILES.items():
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    damage(tmp_path / "c.jsonl", (tmp_path / "c.jsonl").read_bytes())

    def make(allowed, state=None):
        return stream(Files(sorted(tmp_path.iterdir()), "text", allowed=allowed), StepShape(1, 1), state, buffer=2)

    expected, failing = following(make(1), 60), make(0)
    met = []
    while (trouble := failing.trouble()) is None:
        met.append(facts(failing.next()))
    assert "c.jsonl, line 17" in str(trouble)
    for _ in range(2):
        with pytest.raises(UserError, match=r"c\.jsonl, line 17"):
            failing.next()
    assert 0 < len(met) < 60
    assert met + following(make(1, json.dumps(failing.state())), 60 - len(met)) == expected


def make_flaky(monkeypatch, kind, every, fails):
    """Make every so many reads of a row fail, `fails` times in a row."""
    rows = kind.rows

    def flaky(documents, dataset):
        iterator = rows(documents, dataset)
        count, failed = getattr(documents, "flaky", (0, 0))
        while True:
            if count % every == every - 1 and failed < fails:
                documents.flaky = count, failed + 1
                raise TryAgain("corpus: the network is down")
            count, failed = count + 1, 0
            documents.flaky = count, failed
            row = next(iterator, None)
            if row is None:
                return
            yield row

    monkeypatch.setattr(kind, "rows", flaky)
    monkeypatch.setattr("train_lm.data.WAITS", (0.0, 0.001, 0.002))


@pytest.mark.parametrize(
    ("source", "kind", "every"),
    [("jsonl", Files, 1), ("jsonl", Files, 7), ("hub", Named, 5), ("saved", Named, 9), ("embedded", Texts, 9)],
)
def test_a_source_that_fails_for_a_while_gives_what_it_would_have_given(
    folder, stream, monkeypatch, capfd, source, kind, every
):
    expected_states, expected = states_and_batches(stream(SOURCES[source](folder)), 17)
    make_flaky(monkeypatch, kind, every, 3)
    states, batches = states_and_batches(stream(SOURCES[source](folder)), 17)
    assert batches == expected
    assert "the network is down; trying again in 0.002 s" in capfd.readouterr().err
    for k in (0, 4, 11):
        assert following(stream(SOURCES[source](folder), state=states[k]), 6) == expected[k : k + 6]
        assert following(stream(SOURCES[source](folder), state=expected_states[k]), 6) == expected[k : k + 6]


def test_a_source_that_goes_on_failing_ends_the_stream_so_that_it_may_be_tried_again(folder, stream, monkeypatch):
    expected = following(stream(SOURCES["jsonl"](folder)), 30)
    with monkeypatch.context() as patch:
        make_flaky(patch, Files, 20, 9)
        data, met = stream(SOURCES["jsonl"](folder)), []
        while (trouble := data.trouble()) is None:
            met.append(facts(data.next()))
    assert isinstance(trouble, TryAgain)
    resumed = stream(SOURCES["jsonl"](folder), state=json.dumps(data.state()))
    assert met + following(resumed, 30 - len(met)) == expected


def test_a_signal_does_not_wait_for_a_source_that_fails(folder, stream, monkeypatch):
    make_flaky(monkeypatch, Files, 20, 9)
    monkeypatch.setattr("train_lm.data.WAITS", (600.0,))
    data = stream(SOURCES["jsonl"](folder))
    started, met = time.monotonic(), 0
    while data.trouble(lambda: time.monotonic() - started > 0.5) is None and time.monotonic() - started < 0.5:
        data.next()
        met += 1
    data.close()
    assert time.monotonic() - started < 60
    json.dumps(data.state())
