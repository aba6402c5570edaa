"""A file is replaced whole, or not at all, and no link is followed."""

import os
from pathlib import Path

import pytest

from octavo.core import fs


def test_a_file_gets_new_content_and_the_folder_no_other(tmp_path):
    path = tmp_path / "run.json"
    for text in ("one", "zwei ü"):
        fs.write_file(path, text, durable=text == "one")
        assert path.read_text("utf-8") == text
    assert os.listdir(tmp_path) == ["run.json"]
    os.umask(old := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~old


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("old")
    with pytest.raises(TypeError), fs.replacing(path) as file:
        file.writelines([b"half", None])
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["tokens"]


def test_links_are_replaced_and_never_written_through(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("precious")
    link.symlink_to(target)
    fs.write_file(link, "new")
    assert (target.read_text(), link.read_text(), link.is_symlink()) == ("precious", "new", False)


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            fs.write_file(path, "x")
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_appending_goes_to_regular_files_only(tmp_path):
    with fs.open_append(tmp_path / "log") as file:
        file.write(b"one ")
    with fs.open_append(tmp_path / "log") as file:
        file.write(b"two")
    assert (tmp_path / "log").read_text() == "one two"
    os.mkfifo(tmp_path / "pipe")
    for name, target in (("link", "log"), ("dangling", "made")):
        (tmp_path / name).symlink_to(tmp_path / target)
    for name in ("link", "dangling", "pipe"):
        with pytest.raises(OSError, match="remove it|No such device"):
            fs.open_append(tmp_path / name)
    assert (tmp_path / "log").read_text() == "one two"
    assert not (tmp_path / "made").exists()


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dead").symlink_to(tmp_path / "nothing")
    for path in (tmp_path / "pipe", tmp_path / "dead", tmp_path, Path("/dev/zero")):
        for read in (fs.read_whole, fs.read_json, fs.check_regular):
            with pytest.raises(OSError, match="regular file|No such file"):
                read(path)


def test_a_file_that_is_read_whole_has_a_largest_size(tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    assert fs.read_whole(tmp_path / "file", limit=4) == b"1234"
    with pytest.raises(OSError, match="larger than the 3 bytes"):
        fs.read_whole(tmp_path / "file", limit=3)


@pytest.mark.parametrize("content", ["[" * 200_000, "{", "\udcff", "1" * 5000])
def test_whatever_is_no_json_is_one_kind_of_error(tmp_path, content):
    (tmp_path / "file").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="."):
        fs.read_json(tmp_path / "file")
