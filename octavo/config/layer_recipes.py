"""A float8 recipe per layer: `float8.layer_recipes`, written by hand, or as a file by `octavo tune`.

    [float8]
    layer_recipes = ["layers.*.attention.wk=high_precision", "layers.*.feed_forward.w?=tensorwise"]

The left side is a pattern for whole module names (*, ? and [abc], as in a shell), the right side a recipe or
`high_precision`. If several patterns match a layer, the last one counts. Layers without a match use
`float8.recipe_name`; layers that `float8.filter_fqns` names stay in high precision in any case.

The file is a TOML file with this one key. `float8.layer_recipes_file` names it, and its content becomes the
value of `float8.layer_recipes` when the job is loaded, so that a run's record holds the recipes themselves.
Whether the patterns match is checked once the model exists.

"""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from octavo.config import names, toml
from octavo.config.schema import Float8
from octavo.config.values import Setting
from octavo.core.errors import ConfigError, Problem, did_you_mean

HIGH_PRECISION = "high_precision"
KEY, FILE_KEY = "float8.layer_recipes", "float8.layer_recipes_file"


@dataclass(frozen=True)
class LayerRecipe:
    """`recipe` (None: high precision) for layers whose names match `pattern`."""

    pattern: str
    recipe: str | None

    @property
    def text(self) -> str:
        """Its text in a configuration."""
        return f"{self.pattern}={self.recipe or HIGH_PRECISION}"


def parse(text: str) -> LayerRecipe:
    """Parse one element of the list. Raises `ConfigError` without the key's name."""
    pattern, equals, recipe = (part.strip() for part in text.partition("="))
    known = (HIGH_PRECISION, *names.RECIPES)
    if not pattern or not equals:
        raise ConfigError(f"{text!r} must be PATTERN=RECIPE, like layers.*.attention.wk={HIGH_PRECISION}")
    if recipe not in known:
        hint = did_you_mean(recipe, known)
        raise ConfigError(f"{text!r}: no recipe is called {recipe!r}; known: {', '.join(known)}{hint}")
    return LayerRecipe(pattern, None if recipe == HIGH_PRECISION else recipe)


def layer_recipes(settings: Float8) -> list[LayerRecipe]:
    """All elements, parsed, in order. Raises `ConfigError` for the first wrong one."""
    return [parse(text) for text in settings.layer_recipes]


def wrong(settings: Float8) -> Iterator[str]:
    """One message, without the key's name, for each wrong element."""
    for text in settings.layer_recipes:
        try:
            parse(text)
        except ConfigError as error:
            yield str(error)


def recipes_named(settings: Float8) -> list[str]:
    """The float8 recipes in use: those of the patterns, and the one for all other layers."""
    rest = settings.recipe_name or names.GATHERABLE_RECIPES[0]
    return list(dict.fromkeys([rest, *(r.recipe for r in layer_recipes(settings) if r.recipe is not None)]))


def read(path: str) -> Setting:
    """Read a file of layer recipes. Raises `ConfigError` if it sets anything else, or nothing."""
    settings, problems = toml.read(path)
    problems += [
        Problem(
            f"{other.where}: {other.written} does not belong here: {FILE_KEY} names a file with {KEY} alone"
        )
        for other in settings
        if other.name != KEY
    ]
    if not problems and not settings:
        problems.append(Problem(f"{path}: has no {KEY}; octavo tune writes such a file"))
    if problems:
        raise ConfigError(problems)
    return settings[0]


def matching(recipes: Sequence[LayerRecipe], name: str) -> LayerRecipe | None:
    """The last of `recipes` whose pattern matches the module called `name`, or None."""
    return next((r for r in reversed(recipes) if fnmatch.fnmatchcase(name, r.pattern)), None)
