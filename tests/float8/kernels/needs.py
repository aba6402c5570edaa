"""What tests of kernels need that not every machine has."""

import importlib.util

import pytest

triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (it has wheels for Linux): pip install 'triton>=3.6'",
)
