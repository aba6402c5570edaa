"""A user's model in a module that is not imported yet."""

import sys
from pathlib import Path

import pytest

from octavo import models

MODULE = """
from dataclasses import replace

from octavo import models
from tests.models.small_llama import SPEC

models.register(replace(SPEC, name="small_llama"))
"""


def own_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write the module into `folder`, make that the working directory, and return the flags that select the
    model. The registry is restored after the test.
    """
    (folder / "small_llamas.py").write_text(MODULE)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "small_llamas", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(models, "_SPECS", dict(models._SPECS))
    return ["--experimental.custom_import=small_llamas", "--model.name=small_llama"]
