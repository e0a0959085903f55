"""What the doctor finds before a token is generated, and that `run` stops at it with one line."""

import json
import shutil
import socket

import nltk
import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from eval.__main__ import main
from eval.answers import count_tokens
from eval.doctor import check_model
from eval.model import load_model
from eval.options import Prompting
from eval.runner import run
from eval.suites import SUITES
from hf_ibnorm.base.errors import UserError


def doctor(command, model, suite, *words):
    return command(main, "doctor", "--model", str(model), "--suite", suite, *map(str, words))


def refused(command, model, suite, *words):
    """The one line with which `run` refuses."""
    code, out, err = command(main, "run", "--model", str(model), "--suite", suite, *map(str, words))
    assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
    return err


def test_a_sound_model_passes_every_check(command, long_checkpoint, mirror):
    code, out, err = doctor(command, long_checkpoint, "v2", "--mirror", mirror)
    assert (code, err) == (0, "")
    marks = [line.split()[:2] for line in out.splitlines()]
    assert {mark for mark, _ in marks} == {"pass"}
    names = [name.rstrip(":") for _, name in marks]
    expected = ["packages", "punkt", "mirror", "tokenizer", "noise", "logits", "padding", "batch_size"]
    assert names == [*expected, *["context"] * 6]


def with_template(checkpoint, target, single):
    shutil.copytree(checkpoint, target)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    special = [(tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("$A <|endoftext|>", "it ends every text with '<|endoftext|>', only that would score"),
        ("<|endoftext|> <|endoftext|> $A", "it puts '<|endoftext|>', '<|endoftext|>' before every text, one too many"),
    ],
)
def test_a_tokenizer_that_adds_too_much_is_refused(command, checkpoint, tmp_path, template, problem):
    path = with_template(checkpoint, tmp_path / "model", template)
    code, out, err = doctor(command, path, "embedded")
    assert code == 2
    assert f"FAIL    tokenizer: {problem}" in out
    assert err.endswith("checks failed: tokenizer\n")
    assert problem in refused(command, path, "embedded", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_adds_bos_passes(checkpoint, tmp_path):
    path = with_template(checkpoint, tmp_path / "model", "<|endoftext|> $A")
    assert all(check.passed for check in check_model(load_model(path, 8, "cpu", "auto")))


def test_a_bos_adding_tokenizer_scores_the_same_rolling_text(checkpoint, tmp_path, score):
    adding = load_model(with_template(checkpoint, tmp_path / "model", "<|endoftext|> $A"), 8, "cpu", "auto")
    assert adding.tok_encode("a")[0] == adding.tokenizer.eos_token_id
    novel = SUITES["embedded"][0]
    assert score(adding, novel) == score(load_model(checkpoint, 8, "cpu", "auto"), novel)
    assert adding.tok_encode("a")[0] == adding.tokenizer.eos_token_id


@pytest.fixture
def lm(checkpoint):
    return load_model(checkpoint, 8, "cpu", "auto")


def failed(lm):
    return [check.name for check in check_model(lm) if not check.passed]


def test_noise_in_the_model_is_noticed(lm):
    lm.model.train()
    assert failed(lm) == ["noise"]
    lm.model.eval()
    assert failed(lm) == []
    lm.model.model.layers[0].input_layernorm.train()
    assert failed(lm) == ["noise"]


def test_a_model_that_looks_beyond_its_text_is_noticed(lm):
    # Logits that depend on the length of what follows, and on the rest of the batch.
    lm.model.lm_head.register_forward_hook(lambda module, inputs, out: out + out.mean(dim=1, keepdim=True))
    assert failed(lm) == ["padding"]
    lm.model.lm_head._forward_hooks.clear()
    lm.model.lm_head.register_forward_hook(lambda module, inputs, out: out + out.mean(dim=0, keepdim=True))
    assert failed(lm) == ["batch_size"]


def test_half_precision_passes(checkpoint):
    for dtype in ("bfloat16", "float16"):
        assert failed(load_model(checkpoint, 8, "cpu", dtype)) == []


def test_a_model_of_nan_is_refused_in_one_line(command, checkpoint, tmp_path, lm):
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    line = refused(command, tmp_path / "model", "embedded", "--output", tmp_path / "out")
    assert line == "error: logits: the model's logits are NaN or infinite\n"
    ignoring = ["--output", tmp_path / "out", "--ignore", "logits", "--limit", 2]
    code, _, err = command(main, "run", "--model", str(tmp_path / "model"), "--suite", "embedded", *map(str, ignoring))
    assert code == 2
    assert "austen_test: the model gives a log-likelihood of nan" in err


def test_ifeval_without_punkt_is_refused_before_anything_is_generated(
    command, long_checkpoint, mirror, tmp_path, monkeypatch
):
    monkeypatch.setattr(nltk.data, "path", [])
    line = refused(command, long_checkpoint, "v2", "--mirror", mirror, "--output", tmp_path / "out")
    assert "punkt: IFEval needs NLTK's punkt_tab" in line
    assert "python -m nltk.downloader punkt_tab" in line
    assert not (tmp_path / "out").exists()
    code, _, _ = doctor(command, long_checkpoint, "v1", "--mirror", mirror)
    assert code == 0  # no task of it needs that


def test_a_folder_of_punkt_with_nothing_to_read_is_refused_too(command, long_checkpoint, mirror, tmp_path, monkeypatch):
    """Where `nltk.download` was stopped, say: IFEval would end with all answers given and none scored."""
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    words = ["--mirror", mirror, "--output", tmp_path / "out"]
    line = refused(command, long_checkpoint, "leaderboard_ifeval", *words)
    assert "punkt: IFEval needs NLTK's punkt_tab" in line
    assert "python -m nltk.downloader punkt_tab" in line


def test_a_short_context_is_refused_for_ifeval_and_left_out_when_asked(command, checkpoint, mirror, tmp_path):
    words = ["--mirror", mirror, "--output", tmp_path / "out"]
    rest = "leaderboard_bbh,leaderboard_math_hard,leaderboard_gpqa,leaderboard_musr,leaderboard_mmlu_pro"
    line = refused(command, checkpoint, "v2", *words, "--skip", rest)
    assert "IFEval: it generates up to 1280 tokens, the model's context is 512; --overlong skip leaves it out" in line
    assert "truncate" not in line
    for policy in ("skip", "truncate"):  # cutting prompts cannot make room
        out = tmp_path / policy
        more = {"mirror": str(mirror), "skip": rest.split(","), "overlong": policy}
        scores = run(str(checkpoint), "v2", str(out), **more)
        row = scores["benchmarks"]["leaderboard_ifeval"]
        assert row["raw"] is None
        assert row["details"]["reason"] == "it generates up to 1280 tokens, the model's context is 512"
        assert scores["average"] is None
        assert "| IFEval | - |" in (out / "scores.md").read_text()


def test_long_prompts_are_refused_cut_and_counted_or_left_out(command, checkpoint, mirror, tmp_path):
    words = ["--mirror", mirror, "--skip", "mmlu,truthfulqa_mc2,winogrande,gsm8k,hellaswag", "--output"]
    line = refused(command, checkpoint, "v1", *words, tmp_path / "out")
    assert "context: ARC: " in line
    assert "prompts are longer than the model's context of 512 tokens" in line
    assert "--overlong truncate cuts them from the left" in line
    more = {"mirror": str(mirror), "skip": ["mmlu", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag"]}
    cut = run(str(checkpoint), "v1", str(tmp_path / "cut"), overlong="truncate", **more)
    row = cut["benchmarks"]["arc_challenge"]
    assert row["details"]["truncated"] == row["details"]["tasks"]["arc_challenge"]["truncated"] > 0
    assert any(note.startswith(f"ARC: {row['details']['truncated']} prompts were cut") for note in cut["notes"])
    left = run(str(checkpoint), "v1", str(tmp_path / "left"), overlong="skip", **more)
    assert left["benchmarks"]["arc_challenge"]["raw"] is None


def test_a_missing_subtask_is_refused_in_one_line(command, long_checkpoint, mirror, tmp_path):
    shutil.copytree(mirror, tmp_path / "mirror")
    shutil.rmtree(tmp_path / "mirror" / "SaylorTwift" / "bbh" / "snarks")
    line = refused(command, long_checkpoint, "v2", "--mirror", tmp_path / "mirror", "--output", tmp_path / "out")
    assert "bbh/snarks/test.jsonl is missing" in line
    assert not (tmp_path / "out").exists()


def test_with_a_mirror_no_network_is_touched(long_checkpoint, mirror, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    skip = [f"leaderboard_{name}" for name in ("bbh", "math_hard", "mmlu_pro", "ifeval")]
    run(str(long_checkpoint), "v2", str(tmp_path / "out"), mirror=str(mirror), skip=skip)


def test_a_failed_check_that_is_ignored_is_noted_beside_the_scores(checkpoint, tmp_path, lm):
    lm.model.lm_head.register_forward_hook(lambda module, inputs, out: out + 0.1 * out.mean(dim=1, keepdim=True))
    with pytest.raises(UserError, match="padding: a text's logits depend on what is beside it"):
        run(lm, "embedded", str(tmp_path / "out"), limit=2)
    scores = run(lm, "embedded", str(tmp_path / "out"), limit=2, ignore=["padding"])
    assert any(note.startswith("ignored: padding: ") for note in scores["notes"])


def test_the_path_and_the_model_itself_agree(checkpoint, lm, tmp_path):
    by_path = run(str(checkpoint), "embedded", str(tmp_path / "path"), limit=20)
    by_harness = run(lm, "embedded", str(tmp_path / "harness"), limit=20)
    by_model = run(lm.model, "embedded", str(tmp_path / "model"), limit=20, tokenizer=lm.tokenizer)
    assert by_path["benchmarks"] == by_harness["benchmarks"] == by_model["benchmarks"]


def test_a_chat_template_that_is_not_there_is_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="apply_chat_template: the tokenizer has no chat template"):
        run(str(checkpoint), "embedded", str(tmp_path / "out"), apply_chat_template=True)


def test_turns_without_a_chat_template_are_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="fewshot_as_multiturn: needs --apply_chat_template"):
        run(str(checkpoint), "embedded", str(tmp_path / "out"), fewshot_as_multiturn=True)


GENERATION = {
    "foo": ({"foo": 1}, "got 'foo', which is no option of generation"),
    "room": ({"max_gen_toks": "x"}, "got max_gen_toks 'x', must be a whole number >= 1"),
    "until": ({"until": "stop"}, "got until 'stop', must be a list of strings"),
}


@pytest.mark.parametrize("name", GENERATION)
def test_a_bad_option_of_generation_is_refused(checkpoint, tmp_path, name):
    options, message = GENERATION[name]
    with pytest.raises(UserError, match=f"gen_kwargs: {message}"):
        run(str(checkpoint), "embedded", str(tmp_path / "out"), gen_kwargs=options)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_nothing_to_begin_a_text_with_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "model" / name
        if path.exists():
            kept = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_token")}
            path.write_text(json.dumps(kept))
    with pytest.raises(UserError, match="tokenizer: it has neither a BOS nor an EOS token"):
        load_model(tmp_path / "model", 8, "cpu", "auto")


def test_an_answer_longer_than_the_context_is_left_out_where_prompts_are_cut(checkpoint, mirror, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 4}))
    scores = run(str(tmp_path / "model"), "hellaswag", str(tmp_path / "out"), mirror=str(mirror), overlong="truncate")
    assert "its longest answer has" in scores["benchmarks"]["hellaswag"]["details"]["reason"]
    assert any(note.startswith("HellaSwag: its longest answer has") for note in scores["notes"])


def test_prompts_are_counted_as_the_harness_encodes_them(checkpoint, tmp_path):
    # With a token before every text, without one, and where there is no prompt before an answer.
    texts = [("", "It is."), ("", "So"), ("A question\nAnswer:", " yes"), ("A question\nAnswer: ", "no")]
    for template in (None, "<|endoftext|> $A"):
        path = with_template(checkpoint, tmp_path / "model", template) if template else checkpoint
        lm = load_model(path, 8, "cpu", "auto")
        seen = []
        lm._loglikelihood_tokens = lambda requests, seen=seen, **_: seen.extend(requests) or []
        requests = [Instance("loglikelihood", {}, pair, i, ("task", i, 1)) for i, pair in enumerate(texts)]
        lm.loglikelihood(requests, disable_tqdm=True)
        prompts = count_tokens(lm, requests, Prompting())
        assert [prompts.tokens[i, i] for i in range(4)] == [len(answer) for _, _, answer in seen]
        assert prompts.longest == max(len(context) + len(answer) - 1 for _, context, answer in seen)
