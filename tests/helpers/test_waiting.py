"""Waits of tests: for events, and for as long as it takes."""

import time

import pytest

from tests.helpers import ranks, waiting


def test_what_never_comes_is_named(monkeypatch):
    monkeypatch.setattr(waiting, "LIMIT", 0.0)
    with pytest.raises(AssertionError, match="waited 0 s for a train"):
        waiting.wait_for("a train", lambda: None)


def test_what_comes_is_returned(tmp_path):
    assert waiting.wait_for("a third", iter([0, None, 3]).__next__) == 3
    (tmp_path / "said").write_text("ready\n")
    assert waiting.wait_for_text(tmp_path / "said", "ready") == "ready\n"


def _later(seconds):
    time.sleep(seconds)
    return seconds


def test_a_process_that_ends_first_leaves_the_others_their_time():
    assert ranks.fork([(_later, (0.0,)), (_later, (0.5,))]) == [0.0, 0.5]
