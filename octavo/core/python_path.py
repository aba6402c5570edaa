"""Finding a user's modules."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def working_directory_last() -> Iterator[None]:
    """Have the working directory at the end of Python's path meanwhile: it cannot shadow another module."""
    sys.path.append(here := os.getcwd())
    try:
        yield
    finally:
        sys.path.reverse()  # the last one, whatever an imported module has added itself
        sys.path.remove(here)
        sys.path.reverse()
