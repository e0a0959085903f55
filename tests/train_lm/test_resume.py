"""A run that was stopped goes on as if it never had been: to the bit, or not at all."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from launching import MODULE, launch, start
from training import (
    config,
    killed,
    metrics,
    result,
    run,
    run_on_pages,
    run_stopped,
    small_corpus,
    steps,
    without_timing,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from warm import python

import train_lm.tasks.language
from hf_ibnorm.base.errors import STOPPED, Stopped, UserError
from train_lm.metrics import MetricsFile
from train_lm.push import push
from train_lm.resume import changed_fields

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)

NOISE = ("--model.norm_type", "layernormalnorm")


def stock_gpt2(folder):
    torch.manual_seed(3)
    GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=304, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder)
    from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

    wrap_tokenizer(train_tokenizer(["some text to learn from"], 257), 64).save_pretrained(folder)
    return folder


RUNS = {
    "a noise norm": NOISE,
    "dropout, gpt2, bf16": ("--model.model_type", "gpt2", "--model.dropout", "0.2", "--mixed_precision", "bf16"),
    "a learned lam": ("--model.norm_kwargs.learn_lam", "true"),
    "a ramped lam": ("--lam_schedule", "linear", "--lam_warmup_steps", "8"),
    "a stream": ("--streaming", "true", "--shuffle_buffer", "3", *NOISE),
    "overrides": ("--model.norm_type", "rmsnorm", "--model.norm_overrides", "[[layers.0.*, layernormalnorm]]"),
    "another checkpoint": ("--model.init_from", "GPT2", "--model.norm_type", "null"),
    "another checkpoint, another norm": ("--model.init_from", "GPT2", *NOISE),
}


@pytest.mark.oldest
@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_by_sigterm_resumes_as_if_never_stopped(name, tmp_path):
    flags = [str(stock_gpt2(tmp_path / "gpt2")) if flag == "GPT2" else flag for flag in RUNS[name]]
    run(tmp_path / "straight", *flags)
    run_stopped(3, tmp_path / "stopped", *flags)  # not at a multiple of checkpoint_every
    assert len(metrics(tmp_path / "stopped")) == 4
    run_stopped(6, tmp_path / "stopped", *flags, "--resume", "auto", number=signal.SIGINT)
    torch.manual_seed(123)
    run(tmp_path / "stopped", *flags, "--resume", "auto")
    assert result(tmp_path / "stopped") == result(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_warning_that_the_end_is_near_ends_a_run_in_order_however_often_it_comes(tmp_path, monkeypatch, number):
    append = MetricsFile.append

    def and_signals(self, row):
        append(self, row)
        if row["step"] == 3:  # as a scheduler does: a warning or more, and then the order
            for each in (number, number, signal.SIGTERM):
                os.kill(os.getpid(), each)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "append", and_signals)
        with pytest.raises(Stopped, match="after step 4, with a checkpoint"):
            run(tmp_path / "run")
    assert "step-4" in steps(tmp_path / "run")
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_warning_that_a_run_was_started_to_ignore_is_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with pytest.raises(pytest.fail.Exception):
            run_stopped(3, tmp_path / "run", number=signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(metrics(tmp_path / "run")) == 10


def stopped_in_validation(monkeypatch, step, run_dir, *flags):
    """Run until a signal that comes in the first batch of the validation after `step`."""
    original, at = train_lm.tasks.language.token_loss, []

    def and_signal(model, inputs, targets):
        if not model.training and len(metrics(run_dir)) == step - 1:
            at.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, inputs, targets)

    with monkeypatch.context() as patched:
        patched.setattr(train_lm.tasks.language, "token_loss", and_signal)
        with pytest.raises(Stopped, match=f"after step {step}, with a checkpoint"):
            run(run_dir, *flags)
    assert len(at) == 1, "validation went on"


def test_a_signal_is_not_kept_waiting_by_a_validation_which_the_resumed_run_makes(tmp_path, monkeypatch):
    flags = [*NOISE, "--per_device_eval_batch_size", "4"]
    run(tmp_path / "straight", *flags)
    stopped_in_validation(monkeypatch, 5, tmp_path / "run", *flags)
    assert len(metrics(tmp_path / "run")) == 4
    stopped_in_validation(monkeypatch, 10, tmp_path / "run", *flags, "--resume", "auto")
    assert len(metrics(tmp_path / "run")) == 9
    assert steps(tmp_path / "run") == ["latest", "step-0", "step-10", "step-5"]
    run(tmp_path / "run", *flags, "--resume", "auto")
    assert result(tmp_path / "run") == result(tmp_path / "straight")


@pytest.mark.parametrize(("flags", "older"), [((), []), (("--keep_every", "5"), ["step-5"])])
def test_before_it_stops_a_run_writes_one_checkpoint_and_not_the_one_before(tmp_path, flags, older):
    run_stopped(5, tmp_path / "run", *flags)  # where step-5 waits to be shown good by a step more
    assert steps(tmp_path / "run") == ["latest", "step-0", *older, "step-6"]


def test_a_signal_in_a_step_that_is_to_be_validated_leaves_that_to_the_resumed_run(tmp_path, monkeypatch):
    run(tmp_path / "straight", *NOISE)
    with monkeypatch.context() as patched:
        patched.setattr(train_lm.tasks.language, "evaluate", None)  # not called
        run_stopped(4, tmp_path / "run", *NOISE)
    run(tmp_path / "run", *NOISE, "--resume", "auto")
    assert result(tmp_path / "run") == result(tmp_path / "straight")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run whose first and fifth checkpoints are kept, with noise; not to be changed."""
    return run_on_pages(tmp_path_factory.mktemp("trained") / "run", *NOISE)


@pytest.fixture
def straight(trained, tmp_path):
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def cut_short(run_dir, *names):
    """A copy of a finished run as a kill could have left it: without final, and without these checkpoints."""
    copy = run_dir.with_name("cut")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run_dir, copy)
    for name in ("final", *(f"checkpoints/{name}" for name in names)):
        shutil.rmtree(copy / name)
    return copy


@pytest.mark.parametrize("gone", [(), ("step-10",), ("step-10", "step-5"), ("step-0", "step-5", "step-10")])
def test_resuming_takes_the_newest_checkpoint_and_cuts_the_metrics_there(straight, gone, capsys):
    cut = cut_short(straight, *gone)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss"')
    run(cut, *NOISE, "--resume", "auto")
    assert result(cut) == result(straight)
    step = next((name for name in ("step-10", "step-5", "step-0") if name not in gone), None)
    expected = f"resume: going on after {step}" if step else "resume: no whole checkpoint, starting at step 0"
    assert expected in capsys.readouterr().out


def test_resuming_where_there_is_nothing_starts_at_step_0_and_says_so(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        run(tmp_path / name, "--max_steps", "2", "--resume", "auto")
        assert f"no run in {tmp_path / name}, starting at step 0" in capsys.readouterr().out
        assert len(metrics(tmp_path / name)) == 2


@pytest.mark.parametrize("left", [["config.yaml"], ["config.yaml", "environment.json"], [".config.yaml.x1"]])
def test_a_run_killed_before_its_first_checkpoint_starts_over(straight, tmp_path, left):
    (tmp_path / "killed").mkdir()
    for name in left:
        source = straight / name if (straight / name).exists() else straight / "config.yaml"
        shutil.copy(source, tmp_path / "killed" / name)
    run(tmp_path / "killed", *NOISE, "--resume", "auto")
    assert result(tmp_path / "killed") == result(straight)


def test_a_finished_run_is_left_as_it_is(straight, capsys):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}
    assert run(straight, *NOISE, "--resume", "auto") == straight / "final"
    assert "already finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()} == before


def test_without_resume_a_run_is_not_touched_and_the_way_on_is_named(straight):
    with pytest.raises(UserError, match=r"is not empty; name a new directory; or go on with it: --resume auto"):
        run(straight)


def test_a_directory_that_holds_something_else_is_not_resumed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run to resume"):
        run(tmp_path, "--resume", "auto")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


CHANGES = {
    "learning_rate was 0.001, got 0.01": ("--learning_rate", "0.01"),
    "seed was 0, got 1": ("--seed", "1"),
    "model.norm_kwargs was {'noise'": ("--model.norm_kwargs.noise", "0.5"),
    "max_steps was 10, got 20": ("--max_steps", "20"),
    "per_device_train_batch_size was 4, got 8": ("--per_device_train_batch_size", "8"),
    "gradient_accumulation_steps was 2, got 4": ("--gradient_accumulation_steps", "4"),
    "streaming was False, got True": ("--streaming", "true"),
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("message", CHANGES)
def test_changed_settings_are_refused_by_name(straight, message, finished):
    cut = straight if finished else cut_short(straight, "step-10")
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        run(cut, *NOISE, *CHANGES[message], "--resume", "auto")
    assert message in str(caught.value)
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before


def test_settings_that_compute_nothing_may_change(straight):
    cut = cut_short(straight, "step-10")
    run(cut, *NOISE, "--resume", "auto", "--checkpoint_every", "3", "--keep_last", "9", "--log_with", "[]")
    assert result(cut) == result(straight)
    assert {"step-6", "step-9"} <= set(steps(cut))


def test_a_setting_that_the_release_before_did_not_have_was_its_default():
    now = config("unused").as_recipe()
    then = {name: value for name, value in now.items() if name not in ("compile", "global_batch_size")}
    assert changed_fields(then, now, (1, 1)) == []
    assert changed_fields(then, {**now, "compile": True}, (1, 1)) == ["compile was False, got True"]


def test_changed_text_is_refused(straight, monkeypatch):
    cut = cut_short(straight, "step-10")
    monkeypatch.setattr("train_lm.corpus.load_corpus", lambda corpus, split: [f"another {split} text " * 300])
    with pytest.raises(UserError, match=r"resume: the training text is not what the run began with \(train_sha\)"):
        run(cut, *NOISE, "--resume", "auto")


@pytest.mark.parametrize("field", ["norm_backend", "device", "torch", "threads"])
def test_a_changed_backend_refuses_exact_resume_and_inexact_goes_on(straight, monkeypatch, field):
    from hf_ibnorm.report.environment import numerics_record

    cut = cut_short(straight, "step-10")
    monkeypatch.setattr("train_lm.resume.numerics_record", lambda: {**numerics_record(), field: "other"})
    with pytest.raises(UserError, match=f"{field} was .*, is 'other'.*--resume inexact"):
        run(cut, *NOISE, "--resume", "auto")
    run(cut, *NOISE, "--resume", "inexact")
    assert len(metrics(cut)) == 10


def test_environment_notes_every_resume(straight):
    cut = cut_short(straight, "step-10")
    run(cut, *NOISE, "--resume", "auto")
    resumed = json.loads((cut / "environment.json").read_text())["resumed"]
    assert [note["step"] for note in resumed] == [5]
    assert resumed[0]["num_processes"] == 1


def test_a_finished_run_is_not_trained_again_for_want_of_its_checkpoints(straight, capsys):
    shutil.rmtree(straight / "checkpoints")
    before = (straight / "metrics.jsonl").read_bytes()
    run(straight, *NOISE, "--resume", "auto")
    assert "already finished" in capsys.readouterr().out
    assert (straight / "metrics.jsonl").read_bytes() == before


def emptied(final):
    shutil.rmtree(final)
    final.mkdir()


def a_file(final):
    shutil.rmtree(final)
    final.write_text("mine")


def a_flipped_bit(final):
    raw = bytearray((final / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (final / "model.safetensors").write_bytes(raw)


def a_cut_file_and_no_manifest(final):
    (final / "manifest.json").unlink()
    (final / "model.safetensors").write_bytes((final / "model.safetensors").read_bytes()[:-5])


FINALS = {
    emptied: "final has no weights, must have safetensors",
    a_file: "final is no folder",
    a_flipped_bit: "final is not as it was saved: model.safetensors is damaged; if it was changed on purpose",
    a_cut_file_and_no_manifest: "final has a damaged model.safetensors",
}


@pytest.mark.parametrize("harm", FINALS, ids=lambda harm: harm.__name__)
def test_a_final_that_is_not_what_was_saved_is_neither_finished_nor_pushed(straight, harm):
    harm(straight / "final")
    with pytest.raises(UserError, match=rf"^run_dir: .*{FINALS[harm]}.*to have it made anew"):
        run(straight, *NOISE, "--resume", "auto")
    with pytest.raises(UserError, match=rf"^run: .*{FINALS[harm]}"):
        push(straight)
    if harm is a_flipped_bit:
        shutil.rmtree(straight / "final")
        run(straight, *NOISE, "--resume", "auto")
        push(straight)


def test_a_final_without_a_manifest_as_older_releases_left_it_is_finished(straight, capsys):
    (straight / "final" / "manifest.json").unlink()
    run(straight, *NOISE, "--resume", "auto")
    assert "already finished" in capsys.readouterr().out


def test_a_second_command_does_not_disturb_the_run_at_work(straight):
    from filelock import FileLock

    cut = cut_short(straight, "step-10")
    half = cut / "checkpoints" / ".step-10.being_written"
    half.mkdir()
    with FileLock(cut / ".lock"), pytest.raises(UserError, match="is in use by another run"):
        run(cut, *NOISE, "--resume", "auto")
    assert half.is_dir()
    run(cut, *NOISE, "--resume", "auto")
    assert not half.exists()


@pytest.mark.parametrize(("norm", "lams"), [("ibnorm_l", (0.0, 2.0, 4.0)), ("ibnorm_s", (1.0, 2.5, 4.0))])
def test_a_ramp_is_saved_as_it_stands_and_ends_where_it_should(tmp_path, norm, lams):
    run(tmp_path / "run", "--lam_schedule", "linear", "--lam_warmup_steps", "10", "--model.norm_type", norm)
    for name, lam in zip(("checkpoints/step-0/model", "checkpoints/step-5/model", "final"), lams, strict=True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)
        assert {float(module.lam) for module in model.modules() if hasattr(module, "lam")} == {lam}
    assert [row["lam_fraction"] for row in metrics(tmp_path / "run")] == [step / 10 for step in range(1, 11)]


RAMPS = {
    "lam is to end at 0, where it starts; name another with --model.norm_kwargs.lam": ("--model.norm_kwargs.lam", "0"),
    "lam is to end at 1, where it starts": ("--model.norm_type", "ibnorm_s", "--model.norm_kwargs.lam", "1"),
    "the model has no IBNorm": ("--model.norm_type", "rmsnorm"),
    "learns its lam": ("--model.norm_kwargs.learn_lam", "true"),
    "lam_warmup_steps: got 0": ("--lam_warmup_steps", "0"),
}


@pytest.mark.parametrize("message", RAMPS)
def test_a_ramp_that_cannot_be_is_refused(tmp_path, message):
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", "--lam_schedule", "linear", "--lam_warmup_steps", "4", *RAMPS[message])
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def command(run_dir, *flags):
    return [python(), "-m", "train_lm", "--config", "tiny", "--run_dir", str(run_dir), *flags]


def wait_until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["a pipe", "a terminal"])
def test_an_output_that_nobody_reads_any_more_ends_no_run(tmp_path, kind):
    end, output = os.pipe() if kind == "a pipe" else os.openpty()
    flags = ["--eval_every", "1", "--max_eval_blocks", "1", "--log_with", "[]"]
    started = subprocess.Popen(command(tmp_path / "run", *flags), stdout=output, stderr=subprocess.PIPE, text=True)
    os.close(output)
    os.read(end, 1)
    os.close(end)
    assert (started.wait(60), "Traceback" in started.stderr.read()) == (0, False)
    assert len(metrics(tmp_path / "run")) == 10
    assert (tmp_path / "run" / "final").is_dir()


def test_the_command_ends_with_75_and_a_second_signal_ends_it_at_once(tmp_path):
    flags = ["--max_steps", "100000", "--eval_every", "100000", "--checkpoint_every", "0", "--max_eval_blocks", "1"]
    flags += ["--model.norm_kwargs.backend", "reference"]  # no warning where no kernels are built
    path = tmp_path / "run" / "metrics.jsonl"
    started = subprocess.Popen(command(tmp_path / "run", *flags), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: path.exists() and path.stat().st_size, started)
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == STOPPED
    step = len(metrics(tmp_path / "run"))
    assert started.stderr.read() == f"stopped: after step {step}, with a checkpoint; go on with --resume auto\n"
    assert steps(tmp_path / "run") == ["latest", "step-0", f"step-{step}"]

    # A process that is stopped in the middle of a step gets both signals when it wakes up.
    again = subprocess.Popen(command(tmp_path / "run", *flags, "--resume", "auto"), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(path.read_bytes().splitlines()) > step, again)
    again.send_signal(signal.SIGSTOP)
    again.send_signal(signal.SIGTERM)
    again.send_signal(signal.SIGINT)
    again.send_signal(signal.SIGCONT)
    assert again.wait(60) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert steps(tmp_path / "run") == ["latest", "step-0", f"step-{step}"]


def test_a_run_killed_while_it_writes_a_checkpoint_resumes_to_the_bit(tmp_path):
    counts = killed(tmp_path, "--kills", "1", "--moment", "checkpoint")
    assert counts["kills"] == counts["checkpoint"] == 1
    assert counts["identical"] == counts["runs"] >= 1


@pytest.mark.slow
def test_runs_killed_at_random_moments_resume_to_the_bit(tmp_path):
    counts = killed(tmp_path, "--kills", "20", "--seed", "1")
    assert counts["kills"] == 20
    assert counts["identical"] == counts["runs"] >= 4
    assert counts["left_a_half_written_checkpoint"]


@pytest.mark.slow
def test_three_processes_sum_gradients_alike_after_a_resume(tmp_path):
    counts = killed(tmp_path, "--kills", "4", "--processes", "3", "--seed", "2")
    assert counts["identical"] == counts["runs"] >= 1


@pytest.mark.slow
def test_the_number_of_processes_may_change_where_the_step_stays_as_large(tmp_path):
    flags = ["--max_eval_blocks", "2", "--model.norm_type", "ibnorm_t"]
    two = ["--config", "tiny", "--run_dir", tmp_path / "two", *flags, "--gradient_accumulation_steps", "1"]
    assert launch(MODULE, "ddp", *two).returncode == 0
    for name in ("final", "checkpoints/step-10"):
        shutil.rmtree(tmp_path / "two" / name)
    one = command(tmp_path / "two", *flags, "--resume", "auto")
    refused = subprocess.run([*one, "--gradient_accumulation_steps", "1"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "a step had 8 sequences with 2 processes, with 1 it has 4" in refused.stderr
    then = without_timing(metrics(tmp_path / "two"))
    done = subprocess.run([*one, "--gradient_accumulation_steps", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 processes have become 1" in done.stdout
    now = without_timing(metrics(tmp_path / "two"))
    assert now[:5] == then[:5]
    assert [row["batch_sha"] for row in now] == [row["batch_sha"] for row in then]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in now] == pytest.approx([row[key] for row in then], rel=1e-4)


@pytest.mark.slow
def test_a_stream_dealt_out_to_other_processes_is_refused_with_the_reason(tmp_path):
    flags = ["--streaming", "true", "--max_eval_blocks", "2", "--max_steps", "4", "--checkpoint_every", "2"]
    two = ["--config", "tiny", "--run_dir", tmp_path / "two", *flags, "--gradient_accumulation_steps", "1"]
    assert launch(MODULE, "ddp", *two).returncode == 0
    shutil.rmtree(tmp_path / "two" / "final")
    one = command(tmp_path / "two", *flags, "--gradient_accumulation_steps", "2", "--resume", "auto")
    refused = subprocess.run(one, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "the stream was dealt out to 2 processes, got 1" in refused.stderr


@pytest.mark.slow
def test_sigterm_to_a_launcher_leaves_a_checkpoint_of_all_processes(tmp_path):
    flags = ["--max_steps", "100000", "--eval_every", "100000", "--checkpoint_every", "0", "--max_eval_blocks", "1"]
    path = tmp_path / "run" / "metrics.jsonl"
    launched = start(MODULE, "ddp", "--config", "tiny", "--run_dir", tmp_path / "run", *flags)
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") > 3, launched)
    launched.send_signal(signal.SIGTERM)
    launched.communicate(timeout=20)  # torchrun kills after 30 what has not ended
    step = len(metrics(tmp_path / "run"))
    assert f"step-{step}" in steps(tmp_path / "run")
