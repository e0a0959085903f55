"""The `hf-ibnorm` command, as a user runs it."""

import json
import subprocess
import sys
import time

import pytest
import torch

from hf_ibnorm.base.command import PATIENCE, run_command
from hf_ibnorm.base.errors import STOPPED, TryAgain
from hf_ibnorm.cli import main


def test_env_prints_what_a_bug_report_needs():
    done = subprocess.run([sys.executable, "-m", "hf_ibnorm.cli", "env", "--json"], capture_output=True, text=True)
    assert done.returncode == 0
    record = json.loads(done.stdout)
    assert record["versions"]["torch"] == torch.__version__
    assert {"device", "norm_backend", "git_revision", "platform"} <= set(record)


def test_env_is_readable_without_json_too(command):
    code, out, _ = command(main, "env")
    assert code == 0
    assert f"torch version: {torch.__version__}\n" in out


@pytest.mark.parametrize(
    ("words", "message"), [(["enw"], "invalid choice: 'enw'"), (["env", "--jsn"], "did you mean '--json'")]
)
def test_bad_words_are_one_line_and_exit_2(command, words, message):
    code, out, err = command(main, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_word_that_is_no_utf_8_is_one_line_and_exit_2(command):
    code, out, err = command(main, "convert", b"\xff".decode("utf-8", "surrogateescape"), "new", "--norm", "dyt")
    assert (code, out, err) == (2, "", "error: command line: got b'\\xff', must be UTF-8\n")


def test_a_verb_s_error_is_one_line_when_run_as_a_module():
    words = ["convert_report", "here", "healed", "--output", "out"]
    done = subprocess.run([sys.executable, "-m", "hf_ibnorm.cli", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: stages: got 'healed', must be NAME=DIR")
    assert done.stderr.count("\n") == 1


def test_what_may_pass_by_itself_is_one_line_and_exit_75(capsys):
    def failing():
        raise TryAgain("corpus: the network is down")

    with pytest.raises(SystemExit) as caught:
        run_command(failing, lower="it")
    assert (caught.value.code, capsys.readouterr().err) == (STOPPED, "error: corpus: the network is down\n")


def test_of_several_processes_the_first_says_what_is_wrong_and_the_others_let_it(command, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        code, out, err = command(main, "enw")
        assert (code, out, err.count("\n")) == (2, "", lines)
    assert waited == [PATIENCE]
