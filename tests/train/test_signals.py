"""Signals are noted, not acted on; only a second Ctrl-C ends a process."""

import os
import signal
import time

import pytest

from octavo.core import exit_codes
from octavo.train import signals
from octavo.train.signals import Signals, Stopped
from tests.helpers import ranks


@pytest.mark.parametrize("number", exit_codes.STOPPING)
def test_a_signal_is_noted_and_handlers_go_back(number):
    former = signal.signal(number, signal.SIG_DFL)  # under nohup it would be to ignore SIGHUP
    try:
        with Signals() as received:
            assert received.asked == 0
            os.kill(os.getpid(), number)
            assert received.received == number
            assert received.asked == 1
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, former)


def test_the_first_signal_counts_and_more_change_nothing():
    with Signals() as received:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert received.received == signal.SIGUSR1


def _interrupted_twice(insists_after, pause):
    signals._INSISTS_AFTER = insists_after
    with Signals():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)
    return "alive"


def test_a_second_ctrl_c_ends_the_process_at_once():
    assert ranks.fork([(_interrupted_twice, (1000.0, 0.0))]) == ["alive"]
    with pytest.raises(AssertionError, match=r"ended with exit code \[-2\]"):
        ranks.fork([(_interrupted_twice, (0.2, 0.3))])


def test_who_ignores_the_terminals_end_goes_on_ignoring_it():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received.received is None
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize(
    ("step", "saves", "saved", "code", "message"),
    [
        (7, True, 7, 75, "after step 7, which is saved. Rerun the command to continue with step 8"),
        (0, True, 0, 75, "before the first step. Rerun the command to continue with step 1"),
        (
            7,
            True,
            5,
            75,
            "after step 7, which could not be saved. Rerun the command to continue from the previous",
        ),
        (
            7,
            False,
            None,
            143,
            "after step 7. Nothing was saved: the job saves no checkpoints (exit code 143)",
        ),
    ],
)
def test_the_message_matches_what_was_saved(step, saves, saved, code, message):
    stopped = Stopped.after(step, {3: int(signal.SIGTERM)}, saves=saves, saved=saved)
    assert str(stopped).startswith(f"Stopped by SIGTERM on rank 3 {message}")
    assert stopped.exit_code == code


def test_a_start_ends_at_once_and_only_once():
    reached = []

    def start(received):
        with received.starting():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append("work")
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, after the terminal's
                reached.append("the way out")

    with Signals() as received:
        with pytest.raises(
            Stopped, match="by SIGTERM on rank 0 while starting. Nothing was saved"
        ) as stopped:
            start(received)
        os.kill(os.getpid(), signal.SIGTERM)  # after the start, it is noted
    assert reached == ["the way out"]
    assert stopped.value.exit_code == 143
    assert not stopped.value.together


def test_an_error_that_follows_from_a_signal_at_the_start_is_no_error():
    def start(received, number):
        with received.starting():
            received.received = number  # another process, which has the same signal, has ended
            raise RuntimeError("Connection closed by peer")

    received = Signals()
    received.saves = True
    with pytest.raises(RuntimeError):
        start(received, None)
    for _ in range(2):  # the second time, nothing starts
        with pytest.raises(Stopped) as stopped:
            start(received, signal.SIGINT)
        assert stopped.value.exit_code == 75
