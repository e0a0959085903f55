"""The `hf-ibnorm` command, as a user runs it."""

import json
import subprocess
import sys

import pytest
import torch


def run(*words):
    return subprocess.run([sys.executable, "-m", "hf_ibnorm.cli", *words], capture_output=True, text=True)


def test_env_prints_what_a_bug_report_needs():
    done = run("env", "--json")
    assert done.returncode == 0
    record = json.loads(done.stdout)
    assert record["versions"]["torch"] == torch.__version__
    assert {"device", "norm_backend", "git_revision", "platform"} <= set(record)


@pytest.mark.parametrize(
    ("words", "message"), [(["enw"], "invalid choice: 'enw'"), (["env", "--jsn"], "did you mean '--json'")]
)
def test_bad_words_are_one_line_and_exit_2(words, message):
    done = run(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
