"""The config's own lists of names equal the registries that give them a meaning."""

from octavo.config import names


def test_controls() -> None:
    from octavo.train.quantization import CONTROLS

    assert tuple(CONTROLS) == names.CONTROLS


def test_corpora_and_tokenizers() -> None:
    from octavo.assets import CORPORA, TOKENIZERS

    assert tuple(TOKENIZERS) == names.TOKENIZERS
    assert set(names.DATASETS) == {*CORPORA, *names.STREAMED_DATASETS}


def test_streamed_corpora() -> None:
    from octavo.data import build

    assert set(names.STREAMED_DATASETS) == set(build._STREAMED)


def test_decay_types() -> None:
    from octavo.optim import lr_schedule

    assert set(names.DECAY_TYPES) == set(lr_schedule._DECAYS)
