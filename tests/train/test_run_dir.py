"""One run at a time in a folder."""

import pytest

from octavo.config import ConfigError
from octavo.train.run_dir import RunFolder
from tests.helpers import ranks


def held(path):
    try:
        RunFolder(path, lock=True)
    except ConfigError as error:
        return str(error)
    return None


def test_second_run_is_refused_until_the_first_ends(tmp_path):
    path = str(tmp_path / "new" / "folder")
    first = RunFolder(path, lock=True)
    (message,) = ranks.fork([(held, (path,))])
    assert f"job.dump_folder = {path}: another run is writing there" in message
    first.release()
    assert ranks.fork([(held, (path,))]) == [None]
    assert ranks.fork([(held, (path,))]) == [None], "a process that ended holds nothing"


def test_other_ranks_do_not_lock(tmp_path):
    first = RunFolder(str(tmp_path), lock=True)
    assert RunFolder(str(tmp_path), lock=False).path == tmp_path
    first.release()


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write there"):
        RunFolder(str(tmp_path / "file" / "folder"), lock=True)
