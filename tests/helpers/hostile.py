"""An attack by pickle: `Touch` runs a command when it is loaded, and creates the file `sentinel`."""

import os
import pickle

import pytest


class Touch:
    """Unpickling it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def sentinel(tmp_path):
    """A file that the attack would create; it must not exist after the test."""
    path = tmp_path / "sentinel"
    pickle.loads(pickle.dumps(Touch(path)))
    assert path.exists(), "the attack itself must work"
    path.unlink()
    yield path
    assert not path.exists(), "code of the checkpoint was run"
