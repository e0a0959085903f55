"""Signals end every command in order, and a second order at once where nothing has to be ended first."""

import os
import signal
import subprocess
import sys

import pytest

from hf_ibnorm.base.errors import STOPPED, Stopped
from hf_ibnorm.base.signals import StopSignals

ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def stopped(number):
    return Stopped(f"{number.name}; go on")


@pytest.mark.parametrize("number", ALL)
def test_the_first_signal_raises_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"^{number.name}; go on$"), StopSignals(stopped):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_what_caught_the_exception_does_not_keep_the_program_going():
    with StopSignals(stopped) as signals:
        signals.check()
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            signals.check()


def test_a_deferred_signal_is_only_noted_and_a_warning_may_come_again():
    with StopSignals(stopped) as signals:
        signals.deferred = True
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.name == "SIGUSR1"


def test_a_warning_ignored_at_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals(stopped) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.name
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("insist", "code"), [(True, 128 + signal.SIGINT), (False, 0)])
def test_a_second_order_ends_at_once_or_is_not_heard_even_afterwards(insist, code):
    program = f"""
import os, signal
from hf_ibnorm.base.signals import StopSignals
try:
    with StopSignals(lambda number: KeyError(number), insist={insist}):
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
except KeyError:
    os.kill(os.getpid(), signal.SIGTERM)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_verb_ends_with_the_signals_exit_code(number, monkeypatch):
    from hf_ibnorm import cli

    monkeypatch.setattr(sys, "argv", ["hf-ibnorm", "env"])
    monkeypatch.setattr("hf_ibnorm.report.environment.environment_record", lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 128 + number


@pytest.mark.parametrize("number", ALL)
def test_a_run_of_eval_says_where_it_stands(number, monkeypatch, capsys):
    from eval.__main__ import main

    monkeypatch.setattr(sys, "argv", ["eval", "run", "--model", "x", "--suite", "embedded", "--output", "out"])
    monkeypatch.setattr("eval.runner.run", lambda *_, **__: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == STOPPED
    place = "benchmarks that ended are in out, the same command goes on from there"
    assert capsys.readouterr().err == f"stopped: {number.name}; {place}\n"
