"""Fixtures of the tests of data."""

import pytest

from octavo.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("octavo_bpe_2048")


@pytest.fixture
def opened():
    """A list of loaders that are closed after the test."""
    loaders = []
    yield loaders
    for loader in loaders:
        loader.close()
