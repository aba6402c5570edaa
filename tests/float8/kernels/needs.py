"""Skip marks for tests that need Triton, its compiler or its interpreter."""

import importlib.metadata
import importlib.util
import os

import pytest

_VERSION = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "0.0"

triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (it has wheels for Linux): pip install 'triton>=3.6'",
)

compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing"
)

interpreter = pytest.mark.skipif(
    tuple(map(int, _VERSION.split(".")[:2])) < (3, 7),
    reason=f"triton {_VERSION}: before 3.7 its interpreter cannot take a loop's bounds from this NumPy",
)
