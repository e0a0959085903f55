"""A run that is not well says so, and loses nothing of what it had learnt."""

import errno
import io
import json
import os
import resource
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from training import config, metrics, pages, result, run, small_corpus, steps, without_timing
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from warm import python

from hf_ibnorm.base.errors import BAD_INPUT, STOPPED, Stopped, TryAgain, UserError
from train_lm.checkpoint import damage
from train_lm.config import build_model_config
from train_lm.data import PackedTokens
from train_lm.session import check_space
from train_lm.state import State
from train_lm.tasks import language
from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)


def poisoned(monkeypatch, steps, where="loss", parts=2):
    """Let the loss, or its gradient, be NaN or infinite in these steps (of `parts` micro-batches)."""
    calls, original = 0, language.token_loss

    def token_loss(model, inputs, targets):
        nonlocal calls
        loss = original(model, inputs, targets)
        if model.training:
            calls += 1
            if -(-calls // parts) in steps:
                return loss * float("nan") if where == "loss" else loss + (loss - loss.detach()) * 1e38 * 1e38
        return loss

    monkeypatch.setattr(language, "token_loss", token_loss)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_without_a_finite_loss_and_gradient_is_skipped_and_counted(tmp_path, monkeypatch, where):
    seen = []
    poisoned(monkeypatch, {4, 5}, where)
    original = State.count

    def count(self, tokens, finite):
        seen.append(next(self.setup.model.parameters()).detach().clone())
        original(self, tokens, finite)

    monkeypatch.setattr(State, "count", count)
    run(tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert [row.get("skipped") for row in rows] == [None, None, None, 1, 2, None, None, None, None, None]
    assert [row["loss"] is None for row in rows[3:5]] == [where == "loss"] * 2
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True, True, False, False, True, True, True, True, True]
    assert steps(tmp_path / "run") == ["latest", "step-0", "step-10"], "a checkpoint of a bad step"
    assert rows[-1]["eval_loss"] < rows[4]["eval_loss"]


def test_too_many_bad_steps_in_a_row_end_the_run_and_keep_the_last_good_checkpoint(tmp_path, monkeypatch):
    poisoned(monkeypatch, range(8, 100))
    flags = ["--max_steps", "60", "--checkpoint_every", "3", "--keep_last", "1", "--max_skipped_steps", "4"]
    with pytest.raises(UserError, match=r"loss: got nan at step 11, 4 steps in a row skipped; .* step-6$"):
        run(tmp_path / "run", *flags, "--eval_every", "50")
    assert len(metrics(tmp_path / "run")) == 11
    assert damage(tmp_path / "run" / "checkpoints" / "step-6") is None
    assert not (tmp_path / "run" / "final").exists()


def test_skipped_steps_are_counted_across_a_resume(tmp_path, monkeypatch):
    from training import run_stopped

    flags = ["--max_skipped_steps", "6", "--eval_every", "50"]
    with monkeypatch.context() as patched:
        poisoned(patched, range(2, 100))
        run_stopped(3, tmp_path / "run", *flags)
    poisoned(monkeypatch, range(100))
    with pytest.raises(UserError, match="at step 7, 6 steps in a row"):
        run(tmp_path / "run", *flags, "--resume", "auto")


def test_a_run_that_has_skipped_many_of_its_steps_is_a_failure_that_says_why(tmp_path, monkeypatch):
    # Never many in a row, and the last step of all is one of them.
    poisoned(monkeypatch, {3, 6, 10})
    said = "loss: not finite, 3 of 10 steps skipped: too many to call this run trained; a learning_rate of .* step-5"
    with pytest.raises(UserError, match=said):
        run(tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 10
    assert not (tmp_path / "run" / "final").exists()
    poisoned(monkeypatch, {1, 5})  # as a resume after step 5 meets them
    with pytest.raises(UserError, match="3 of 10 steps skipped"):
        run(tmp_path / "run", "--resume", "auto")


def test_a_few_skipped_steps_are_told_at_the_end(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {3, 6})
    run(tmp_path / "run")
    assert f"finished: {tmp_path / 'run' / 'final'}, 2 of 10 steps skipped\n" in capsys.readouterr().out


@pytest.mark.parametrize("norm", ["ibnorm_l", "rmsnorm", "dyt"])
def test_gain_movement_is_what_the_weights_say(tmp_path, norm):
    run(tmp_path / "run", "--model.norm_type", norm, "--checkpoint_every", "5")
    start, then = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / name / "model")
        for name in ("step-0", "step-5")
    )
    gains = [name for name, value in start.named_parameters() if "norm" in name and name.endswith("weight")]
    moved = torch.cat([(then.get_parameter(name) - start.get_parameter(name)).flatten() for name in gains])
    rows = metrics(tmp_path / "run")
    assert rows[0]["gain_movement"] == 0
    # As the step after the checkpoint finds the gains.
    assert rows[5]["gain_movement"] == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-5)


def test_weights_in_bfloat16_are_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match=r"model.dtype: got 'bfloat16'.*a gain near 1 never moves.*mixed_precision"):
        run(tmp_path / "run", "--model.dtype", "bfloat16")
    assert not (tmp_path / "run").exists()


def test_the_reason_is_true_and_autocast_is_the_remedy(tmp_path):
    gain = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(100):
        gain += 1e-3
    assert torch.equal(gain, torch.ones_like(gain))
    run(tmp_path / "run", "--mixed_precision", "bf16")
    assert metrics(tmp_path / "run")[-1]["gain_movement"] > 1e-3


def test_a_bfloat16_checkpoint_is_trained_in_float32(tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    stock = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **size)).to(torch.bfloat16)
    stock.save_pretrained(tmp_path / "stock")
    run(tmp_path / "first", "--max_steps", "2")
    flags = ["--model.init_from", str(tmp_path / "stock"), "--tokenizer", str(tmp_path / "first" / "final")]
    run(tmp_path / "run", *flags, "--model.norm_type", "ibnorm_t")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step-0" / "model")
    assert start.dtype == torch.float32
    assert start.config.norm_type == "ibnorm_t"
    for name, value in stock.named_parameters():
        assert torch.equal(start.get_parameter(name), value.float()), name
    assert metrics(tmp_path / "run")[-1]["gain_movement"] > 1e-4


STARTS = {
    "model.init_from: got 'ABSENT', no such directory, and the Hub gives no model": ("ABSENT",),
    "model.init_from: got 'RUN', which holds no model; did you mean RUN/final?": ("RUN",),
    "model.init_from: got 'vit', must be the model type of a causal language model": ("VIT",),
    "model.init_from: got a IBNormBertLMHeadModel, which looks at the tokens that it is to predict": ("BERT",),
    "model.init_from: got 'LLAMA', no tokenizer": ("LLAMA",),
    "block_size: got 32, must be <= model.max_position_embeddings = 16": ("LLAMA", "--tokenizer", "TOKENIZER"),
    "model.vocab_size: got 40, the tokenizer has": ("SMALL", "--tokenizer", "TOKENIZER"),
}


@pytest.mark.parametrize("message", STARTS)
def test_a_checkpoint_that_cannot_be_started_from_is_refused(tmp_path, message):
    from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, rows, context in (("LLAMA", 300, 16), ("SMALL", 40, 64)):
        LlamaForCausalLM(LlamaConfig(vocab_size=rows, max_position_embeddings=context, **size)).save_pretrained(
            tmp_path / name
        )
    (tmp_path / "RUN" / "final").mkdir(parents=True)
    BertForMaskedLM(BertConfig(vocab_size=300, **size)).save_pretrained(tmp_path / "BERT")
    (tmp_path / "VIT").mkdir()
    (tmp_path / "VIT" / "config.json").write_text('{"model_type": "vit"}')
    for name in ("TOKENIZER", "BERT", "VIT"):
        wrap_tokenizer(train_tokenizer(["some text"], 257), 16).save_pretrained(tmp_path / name)
    flags = [str(tmp_path / flag) if flag.isupper() else flag for flag in STARTS[message]]
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", "--model.init_from", *flags)
    assert message in str(caught.value).replace(f"{tmp_path}/", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("harm", ["missing weights", "a truncated file"])
def test_a_checkpoint_that_is_not_whole_is_not_started_from(tmp_path, harm):
    run(tmp_path / "first", "--max_steps", "2")
    file = tmp_path / "first" / "final" / "model.safetensors"
    if harm == "missing weights":
        kept = {key: value for key, value in load_file(file).items() if ".1.mlp." not in key}
        save_file(kept, file, {"format": "pt"})
    else:
        os.truncate(file, file.stat().st_size - 100)
    said = {
        "missing weights": "which lacks model.layers.1.mlp.down_proj.weight, .*: 3 in",
        "a truncated file": "cannot be read",
    }[harm]
    with pytest.raises(UserError, match=rf"model.init_from: .*{said}"):
        run(tmp_path / "run", "--model.init_from", str(tmp_path / "first" / "final"))
    assert not (tmp_path / "run").exists()


def test_dropout_is_the_runs_own_when_it_starts_from_a_checkpoint(tmp_path):
    run(tmp_path / "first", "--max_steps", "2", "--model.dropout", "0.1")
    flags = ["--max_steps", "2", "--model.init_from", str(tmp_path / "first" / "final"), "--model.dropout", "0.3"]
    model = AutoModelForCausalLM.from_pretrained(run(tmp_path / "run", *flags))
    assert model.config.attention_dropout == 0.3


def test_a_launchers_own_accumulation_does_not_divide_the_gradient_again(tmp_path, monkeypatch):
    run(tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run(tmp_path / "told")
    assert without_timing(metrics(tmp_path / "told")) == without_timing(metrics(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config: got true"),
        (
            "ACCELERATE_DYNAMO_BACKEND",
            "INDUCTOR",
            "dynamo_backend: got inductor, allowed: no; set compile",
        ),
    ],
)
def test_what_a_launcher_asks_for_and_is_not_done_is_refused(tmp_path, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"launcher: {message}"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("corpus", "reader"),
    [("austen", "train_lm.corpus.load_corpus"), ("some/dataset", "datasets.get_dataset_split_names")],
)
def test_a_signal_while_the_text_is_read_ends_the_command_as_a_signal_does(tmp_path, monkeypatch, corpus, reader):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(reader, interrupted)
    with pytest.raises(Stopped, match="SIGTERM before the first step"):
        run(tmp_path / "run", "--corpus", corpus)
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_an_error_on_one_process_reaches_the_user_from_all_of_them(tmp_path):
    # Of one document to stream, the second of two processes gets none.
    (tmp_path / "one.jsonl").write_text('{"text": "%s"}\n' % ("a word " * 400))
    (tmp_path / "other.jsonl").write_text('{"text": "%s"}\n' % ("a word " * 400))
    command = [python(), "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    flags = ["--config", "tiny", "--run_dir", str(tmp_path / "run"), "--corpus", str(tmp_path / "one.jsonl")]
    flags += ["--streaming", "true", "--validation_corpus", str(tmp_path / "other.jsonl")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "-m", "train_lm", *flags], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert done.stderr.count("error: corpus: process 1 of 2 gets no document of it") == 1
    assert "train_lm/train.py" not in done.stderr, "a process left a traceback"


def test_validation_is_quiet_and_draws_nothing(tmp_path):
    noisy = ["--model.norm_type", "layernormalnorm", "--model.dropout", "0.3"]
    for name, every in (("often", "1"), ("once", "10")):
        run(tmp_path / name, *noisy, "--eval_every", every)
    often, once = (without_timing(metrics(tmp_path / name)) for name in ("often", "once"))
    assert [row["loss"] for row in often] == [row["loss"] for row in once]
    assert often[-1]["eval_loss"] == once[-1]["eval_loss"]


def test_evaluating_with_noise_on_is_impossible(tmp_path):
    wanted = config(tmp_path, "--model.norm_type", "layernormalnorm")
    model = AutoModelForCausalLM.from_config(build_model_config(wanted, 300, 0))
    model.model.norm.train = lambda mode=True: model.model.norm  # a part that does not listen
    with pytest.raises(RuntimeError, match=r"model\.norm: still in training mode"):
        language.evaluate(model, PackedTokens(torch.arange(65).numpy(), 0, 8), wanted, Accelerator(cpu=True))


def test_a_disk_without_room_is_an_error_before_training(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000))
    with pytest.raises(
        UserError, match=r"run_dir: .* needs 0.00134 GB for its checkpoints, 0.001 GB are free; make room"
    ):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", "--checkpoint_every", "0", "--max_steps", "2", "--log_with", "[]")


def test_room_is_for_the_checkpoints_that_will_be_kept(tmp_path, monkeypatch):
    import shutil

    wanted = config(tmp_path, "--keep_last", "3")
    model = AutoModelForCausalLM.from_config(build_model_config(wanted, 300, 0))
    weights = 4 * model.num_parameters()
    for free, fits in ((14 * weights, True), (14 * weights - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(free, 0, free))
        if fits:
            check_space(tmp_path, model, wanted, resumed=False)
        else:
            with pytest.raises(UserError, match="lower keep_last"):
                check_space(tmp_path, model, wanted, resumed=False)


def test_a_file_that_cannot_grow_ends_the_run_and_leaves_no_half_checkpoint(tmp_path):
    # A limit on the size of files stands in for a full disk: both fail a write in its middle.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(UserError, match="run_dir: a checkpoint could not be written: .*File too large"):
            run(tmp_path / "run", "--checkpoint_every", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["latest", "step-0"]
    assert damage(tmp_path / "run" / "checkpoints" / "step-0") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_loses_no_checkpoint(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1800k", "none", str(tmp_path)]).returncode:
        pytest.skip("this system does not let root mount a disk")
    try:
        flags = ["--config", "tiny", "--run_dir", str(tmp_path / "run"), "--checkpoint_every", "2", "--keep_every", "2"]
        flags += ["--model.norm_kwargs.backend", "reference"]  # no warning where no kernels are built
        (tmp_path / "filler").write_bytes(bytes(200_000))
        done = subprocess.run(
            [python(), "-m", "train_lm", *flags, "--max_eval_blocks", "1"], capture_output=True, text=True
        )
        assert done.returncode == 2, done.stderr
        assert "No space left on device" in done.stderr
        assert done.stderr.count("\n") == 1
        whole = [name for name in steps(tmp_path / "run") if name.startswith("step-")]
        assert len(whole) >= 2
        assert all(damage(tmp_path / "run" / "checkpoints" / name) is None for name in whole)
        (tmp_path / "filler").unlink()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """Flags of a run on a stream, of which one line in the middle is no JSON; read in small parts, in its own order."""
    monkeypatch.setattr("train_lm.cache.CHUNK", 500)
    lines = [
        json.dumps({"text": f"{i}: {page[i * 300 : i * 300 + 300]}"})
        for page in pages("austen", "train")
        for i in range(60)
    ]
    lines.insert(6, '{"text": "cut off')
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": pages("austen", "validation")[0]}))
    flags = ["--corpus", str(tmp_path / "train.jsonl"), "--validation_corpus", str(tmp_path / "held.jsonl")]
    wrap_tokenizer(train_tokenizer(pages("austen", "train"), 300), 32).save_pretrained(tmp_path / "tokenizer")
    flags += ["--tokenizer", str(tmp_path / "tokenizer")]
    return [*flags, "--streaming", "true", "--shuffle_buffer", "2", "--checkpoint_every", "0"]


def test_a_bad_document_of_a_stream_ends_the_run_after_a_checkpoint_and_may_be_left_out_then(tmp_path, stream):
    run(tmp_path / "straight", *stream, "--max_bad_documents", "1")
    rows = metrics(tmp_path / "straight")
    assert [row["bad_documents"] for row in rows] == sorted(row["bad_documents"] for row in rows)
    assert (rows[0]["bad_documents"], rows[-1]["bad_documents"]) == (0, 1)
    with pytest.raises(
        UserError, match=r"train\.jsonl, line 7, is no JSON.*max_bad_documents.*; stopped after step \d"
    ) as caught:
        run(tmp_path / "run", *stream)
    assert caught.value.exit_code == BAD_INPUT
    step = len(metrics(tmp_path / "run"))
    assert 1 < step < 10
    assert steps(tmp_path / "run") == ["latest", "step-0", f"step-{step}"]
    run(tmp_path / "run", *stream, "--resume", "auto", "--max_bad_documents", "1")
    told = [{**row, "bad_documents": 0} for row in metrics(tmp_path / "run")]
    assert without_timing(told) == [{**row, "bad_documents": 0} for row in without_timing(rows)]
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "straight")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_disk_that_fails_ends_a_stream_after_a_checkpoint_to_be_gone_on_from(tmp_path, stream, monkeypatch, capfd):
    flags = [*stream, "--max_bad_documents", "1"]
    run(tmp_path / "straight", *flags)
    opened, rows = Path.open, []

    class Failing(io.BufferedReader):
        """A file of whose lines those from the ninth on cannot be read."""

        def __next__(self):
            rows.append(self)
            if len(rows) > 8:
                raise OSError(errno.EIO, "Input/output error")
            return super().__next__()

    monkeypatch.setattr("train_lm.data.WAITS", (0.01, 0.02))

    def failing(path, *mode, **options):
        file = opened(path, *mode, **options)
        return Failing(file.detach()) if path.name == "train.jsonl" else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        with pytest.raises(
            TryAgain, match=r"train\.jsonl cannot be read: .*Input/output error; stopped after step"
        ) as caught:
            run(tmp_path / "run", *flags)
    assert caught.value.exit_code == STOPPED
    assert "trying again in 0.02 s" in capfd.readouterr().err
    assert 1 < len(metrics(tmp_path / "run")) < 10
    run(tmp_path / "run", *flags, "--resume", "auto")
    assert result(tmp_path / "run") == result(tmp_path / "straight")
