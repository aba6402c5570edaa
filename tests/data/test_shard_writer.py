"""A shard's file while it is written."""

from octavo.data.shard_writer import _OpenFile


def test_a_file_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "train.tokens.tmp").symlink_to(tmp_path / "precious")
    file = _OpenFile(tmp_path / "train.tokens")
    file.write(b"ids")
    assert file.publish().name == "train.tokens"
    assert (tmp_path / "train.tokens").read_bytes() == b"ids"
    assert (tmp_path / "precious").read_text() == "precious"
