"""Chooses the recipe of each layer by cost, and writes the choices as TOML.

Layers that read the same tensor form a group, because layers of one recipe share its cast: the total cost of
every combination of recipes in the group is compared. A layer's weight is cast once per `microbatches`. Of
the combinations within `MARGIN` of the cheapest, the most precise is chosen, because a difference within
noise does not justify a loss of accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from octavo.commands.tune.linear_sizes import Group, Layer, Size
from octavo.commands.tune.recipe_costs import HIGH_PRECISION, Costs

MARGIN = 0.02
PRECISION = (HIGH_PRECISION, "rowwise_with_gw_hp", "blockwise", "mxfp8", "rowwise", "tensorwise")
"""Most precise first; other recipes rank last."""


@dataclass(frozen=True)
class RecipeChoice:
    """A layer's recipe, and the seconds per microbatch of one of its `layer.count` layers: in this recipe,
    including its share of shared casts, and in high precision (None: it was not a candidate).
    """

    layer: Layer
    recipe: str
    seconds: float
    high_precision: float | None


def _rank(recipe: str) -> int:
    return PRECISION.index(recipe) if recipe in PRECISION else len(PRECISION)


def _seconds(
    group: Group, recipes: Sequence[str], costs: Mapping[Size, Costs], microbatches: Mapping[str, float]
) -> list[float]:
    """Seconds per layer; layers with the same recipe share the casts of the input."""
    seconds = []
    for layer, recipe in zip(group, recipes, strict=True):
        parts = costs[layer.size][recipe]
        shared = parts.input / recipes.count(recipe) + parts.weight / microbatches.get(recipe, 1.0)
        seconds.append(parts.products + parts.gradient + shared)
    return seconds


def choose(
    group: Group, costs: Mapping[Size, Costs], microbatches: Mapping[str, float]
) -> list[RecipeChoice]:
    """Choose a recipe for each layer of `group`.

    microbatches: recipe -> how many microbatches share one cast of a weight (default 1).
    """
    combinations = {
        recipes: _seconds(group, recipes, costs, microbatches)
        for recipes in product(costs[group[0].size], repeat=len(group))
    }
    least = min(map(sum, combinations.values()))
    near = [recipes for recipes, seconds in combinations.items() if sum(seconds) <= least * (1 + MARGIN)]
    best = min(near, key=lambda recipes: (sum(map(_rank, recipes)), sum(combinations[recipes])))
    choices = []
    for layer, recipe, seconds in zip(group, best, combinations[best], strict=True):
        high_precision = costs[layer.size].get(HIGH_PRECISION)
        choices.append(
            RecipeChoice(layer, recipe, seconds, high_precision.products if high_precision else None)
        )
    return choices


def layer_recipes_toml(choices: Sequence[RecipeChoice], comments: Sequence[str]) -> str:
    """The text of the TOML file: comments, and `float8.layer_recipes`."""
    rows = [(f'"{c.layer.pattern}={c.recipe}",', _cost_comment(c)) for c in choices]
    width = max(len(entry) for entry, _ in rows)
    lines = [f"# {line}".rstrip() for line in comments]
    lines += ["", "[float8]", "layer_recipes = ["]
    lines += [f"  {entry:<{width}}  # {comment}" for entry, comment in rows]
    return "\n".join([*lines, "]", ""])


def _cost_comment(choice: RecipeChoice) -> str:
    gain = ""
    if choice.high_precision is not None:
        high = 1e6 * choice.high_precision
        gain = f", high precision {high:.0f} us: {choice.high_precision / choice.seconds:.2f}x"
    return f"{choice.layer.size}: {1e6 * choice.seconds:.0f} us{gain}"
