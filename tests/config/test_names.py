"""The config's own lists of names equal the registries that give them a meaning."""

from typing import get_args

from octavo.config import names


def test_models() -> None:
    from octavo.models import registered

    assert {name: tuple(spec.flavors) for name, spec in registered().items()} == dict(names.MODELS)


def test_recipes() -> None:
    from octavo.float8.recipe import RECIPES, When

    assert tuple(RECIPES) == names.RECIPES
    assert tuple(name for name in RECIPES if RECIPES[name].gatherable) == names.GATHERABLE_RECIPES
    before = When.PREVIOUS_STEP
    previous = [
        name
        for name, recipe in RECIPES.items()
        if any(cast and cast.when is before for g in recipe.gemms.values() for cast in (g.a, g.b))
    ]
    assert tuple(previous) == names.PREVIOUS_STEP_RECIPES


def test_controls() -> None:
    from octavo.train.quantization import CONTROLS

    assert tuple(CONTROLS) == names.CONTROLS
    assert get_args(names.AnyRecipeName) == (*names.RECIPES, *names.CONTROLS)


def test_corpora_and_tokenizers() -> None:
    from octavo.assets import CORPORA, TOKENIZERS

    assert tuple(TOKENIZERS) == names.TOKENIZERS
    assert set(names.DATASETS) == {*CORPORA, *names.STREAMED_DATASETS}


def test_streamed_corpora() -> None:
    from octavo.data import build

    assert set(names.STREAMED_DATASETS) == set(build._STREAMED)


def test_optimizers() -> None:
    from octavo.optim import low_bit, optimizer

    ours = {name for name in names.OPTIMIZERS if hasattr(low_bit, name)}
    assert ours == {"AdamW", "AdamW8bit"}
    assert ours | set(optimizer._CLASSES) == set(names.OPTIMIZERS)


def test_decay_types() -> None:
    from octavo.optim import lr_schedule

    assert set(names.DECAY_TYPES) == set(lr_schedule._DECAYS)
