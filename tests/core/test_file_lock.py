"""Locks neither follow links nor touch what a file holds."""

import os

import pytest

from octavo.core.file_lock import open_lock, try_lock


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    first, second = open_lock(tmp_path / "lock"), open_lock(tmp_path / "lock")
    assert try_lock(first)
    assert not try_lock(second)
    first.close()
    assert try_lock(second)
    second.close()


def test_what_a_lock_file_holds_stays(tmp_path):
    (tmp_path / "mine").write_text("precious")
    os.link(tmp_path / "mine", tmp_path / ".lock")
    with open_lock(tmp_path / ".lock") as file:
        assert try_lock(file)
    assert (tmp_path / "mine").read_text() == "precious"


def test_links_and_pipes_are_refused(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "made")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("link", "symbolic link"), ("dangling", "symbolic link"), ("pipe", "regular file")):
        with pytest.raises(OSError, match=f"{name} is .*{said}.*remove it"):
            open_lock(tmp_path / name)
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "made").exists()
