"""Written answers are those that a task asks for, whatever a checkpoint's generation_config says."""

import json
import shutil

import pytest
from transformers import GenerationConfig

from eval.__main__ import main
from eval.model import fingerprint, load_model
from eval.runner import run

OWN = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(1, 150)),
    "max_time": 1e-9,
    "max_new_tokens": 2,
    "do_sample": True,
    "temperature": 3.0,
}
"""Each changes what is written."""
ASKED = {"limit": 2, "gen_kwargs": {"max_gen_toks": 12}}


@pytest.fixture(scope="module")
def generating(long_checkpoint, tmp_path_factory):
    """The checkpoint with a generation_config of its own."""
    path = tmp_path_factory.mktemp("generating") / "model"
    shutil.copytree(long_checkpoint, path)
    config = path / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **OWN}))
    return path


def answers(out):
    result = json.loads((out / "results" / "gsm8k.json").read_text())["tasks"]["gsm8k"]
    return [item["answer"] for item in result["items"]], result["generation"]


@pytest.fixture(scope="module")
def plain(long_checkpoint, mirror, tmp_path_factory):
    """Directory of the plain checkpoint's answers."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run(str(long_checkpoint), "gsm8k", str(out), mirror=str(mirror), **ASKED)
    return out


@pytest.mark.oldest
def test_what_a_checkpoint_says_of_generation_is_not_used_and_named(generating, plain, mirror, tmp_path):
    scores = run(str(generating), "gsm8k", str(tmp_path / "out"), mirror=str(mirror), **ASKED)
    assert answers(tmp_path / "out") == answers(plain)
    (note,) = [each for each in scores["notes"] if "generation_config" in each]
    assert note.startswith("not used, for no task asks for it: ")
    for name in OWN:
        assert f"{name}=" in note
    assert not [each for each in json.loads((plain / "manifest.json").read_text())["notes"] if "generation" in each]


def test_the_doctor_names_it_where_answers_are_written(generating, mirror, command):
    words = ["--model", str(generating), "--mirror", str(mirror)]
    assert "repetition_penalty=5.0" in command(main, "doctor", *words, "--suite", "gsm8k")[1]
    assert "repetition_penalty" not in command(main, "doctor", *words, "--suite", "winogrande")[1]


def test_what_a_task_asks_for_is_used(generating, plain, mirror, tmp_path):
    asked = {**ASKED, "gen_kwargs": {"max_gen_toks": 12, "no_repeat_ngram_size": 1}}
    run(str(generating), "gsm8k", str(tmp_path / "out"), mirror=str(mirror), **asked)
    said, how = answers(tmp_path / "out")
    assert said != answers(plain)[0]
    assert how["no_repeat_ngram_size"] == 1


def test_a_model_that_is_given_keeps_its_generation_config(generating, mirror, tmp_path):
    lm = load_model(generating, 8, "cpu", "auto")
    run(lm, "gsm8k", str(tmp_path / "out"), mirror=str(mirror), **ASKED)
    assert lm.model.generation_config.repetition_penalty == 5.0


def test_how_texts_end_is_part_of_what_a_model_is(long_checkpoint):
    lm = load_model(long_checkpoint, 8, "cpu", "auto")
    before = fingerprint(lm)
    lm.model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[0, 7])
    found = fingerprint(lm)
    assert {name for name in found if found[name] != before[name]} == {"generation"}
    lm.model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    assert fingerprint(lm) == before
    lm.tokenizer.clean_up_tokenization_spaces = not lm.tokenizer.clean_up_tokenization_spaces
    assert {name for name in before if fingerprint(lm)[name] != before[name]} == {"tokenizer"}


def test_answers_that_were_asked_for_in_another_way_are_not_compared(plain, tmp_path, command):
    """Those of a version that wrote as the checkpoint said, for one."""
    shutil.copytree(plain, tmp_path / "before")
    path = tmp_path / "before" / "results" / "gsm8k.json"
    content = json.loads(path.read_text())
    del content["tasks"]["gsm8k"]["generation"]
    path.write_text(json.dumps(content))
    words = ["compare", str(plain), str(tmp_path / "before"), "--output", str(tmp_path / "out")]
    code, _, err = command(main, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "gsm8k has another generation: None in" in err
