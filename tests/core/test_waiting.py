"""A silent run says what it waits for."""

import threading
import time

import pytest

from octavo.core import logging, waiting
from octavo.train.builtin_hooks import TellActivity


def test_only_silence_is_broken(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.logger, "propagate", True)
    monkeypatch.setattr(logging, "last_line", lambda: 100.0)
    monkeypatch.setattr(waiting.activity, "what", "the start")
    monkeypatch.setattr(waiting.activity, "since", 0.0)
    caplog.set_level("INFO", logger="octavo")
    hook = TellActivity(compiles=True)
    hook.before_step(1)
    waiting.activity.since = 90.0
    waiting.remind(113.9)
    assert [message.partition(":")[0] for message in caplog.messages] == ["Step 1 compiles the model"]
    waiting.remind(114.0)
    assert caplog.messages[-1] == "Busy with step 1, which compiles the model, for 0:00:24 so far"
    hook.before_step(2)
    assert waiting.activity.what == "step 2"
    assert len(caplog.messages) == 2


def test_a_log_line_ends_the_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.logger, "handlers", [])
    monkeypatch.setattr(logging.logger, "propagate", logging.logger.propagate)
    logging.init_logger()
    before = time.monotonic()
    logging.logger.info("line")
    assert before <= logging.last_line() <= time.monotonic()


def test_a_thread_looks_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()
    monkeypatch.setattr(waiting, "_LOOK_EVERY", 0.01)
    monkeypatch.setattr(waiting, "remind", lambda now: looked.set())
    with waiting.reminders():
        assert looked.wait(60)
    assert not [thread for thread in threading.enumerate() if thread.name == "reminders"]
