"""A model of a user's own, in a module that is not imported yet."""

import sys
from pathlib import Path

import pytest

from octavo import models

MODULE = """
from dataclasses import replace

from octavo import models
from octavo.models.llama3 import SPEC

models.register(replace(SPEC, name="small_llama"))
"""


def own_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write it into `folder`, the working directory from now on; returns the flags that choose it. What the
    test registers is forgotten after it.
    """
    (folder / "small_llamas.py").write_text(MODULE)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "small_llamas", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(models, "_SPECS", dict(models._SPECS))
    return ["--experimental.custom_import=small_llamas", "--model.name=small_llama"]
