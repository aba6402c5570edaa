"""These tests run under Triton's interpreter, which a process must choose before it imports triton:
`tests/float8/kernels/test_interpreted.py` starts one for each file. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/float8/kernels/interpreted
"""

import os
from collections.abc import Iterator

import numpy as np
import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _float_arithmetic_is_silent() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of infinities and NaN; casts are to handle them."""
    with np.errstate(all="ignore"):
        yield
