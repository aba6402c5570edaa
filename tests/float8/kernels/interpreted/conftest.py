"""These tests run under Triton's interpreter, which a process must choose before it imports triton:
`tests/float8/kernels/test_interpreted.py` starts one for each file. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/float8/kernels/interpreted
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _float_arithmetic_is_silent() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of infinities and NaN; casts are to handle them."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True, scope="session")
def _launches_patch_each_module_once() -> Iterator[None]:
    """The interpreter puts its own functions in place of Triton's when a kernel starts, and looks for more to
    replace at every call of a device function: a quarter of its time, for nothing after a module's first.
    """
    from triton.runtime import interpreter

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[str] = set()

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", start)
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        yield
