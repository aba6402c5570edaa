"""The recipe of each layer, given what each costs; and the TOML file that says so.

Layers that read one tensor are chosen for together, because its cast is paid once for all of them that take
one recipe: every combination of recipes in the group is added up, and the cheapest wins. A layer's weight is
cast once for `microbatches` of them. Where the cheapest combination gains less than `MARGIN` over one that is
more precise, the more precise is taken: a difference within noise is no reason to lose accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from octavo.commands.tune.linear_sizes import Group, Layer, Size
from octavo.commands.tune.recipe_costs import HIGH_PRECISION, Costs

MARGIN = 0.02
PRECISION = (HIGH_PRECISION, "rowwise_with_gw_hp", "blockwise", "mxfp8", "rowwise", "tensorwise")
"""Most precise first; a recipe that is not in it comes last."""


@dataclass(frozen=True)
class RecipeChoice:
    """One layer's recipe. Seconds of one microbatch, of one of its `layer.count` layers: in this recipe, with
    its share of casts that others use too, and in high precision (None: it was no candidate).
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
    """Each layer's, sharing the casts of the input among those with the same recipe."""
    found = []
    for layer, recipe in zip(group, recipes, strict=True):
        parts = costs[layer.size][recipe]
        shared = parts.input / recipes.count(recipe) + parts.weight / microbatches.get(recipe, 1.0)
        found.append(parts.products + parts.gradient + shared)
    return found


def choose(
    group: Group, costs: Mapping[Size, Costs], microbatches: Mapping[str, float]
) -> list[RecipeChoice]:
    """A recipe for each layer of `group`. `microbatches`: recipe -> how many share one cast of a weight (1
    where it does not say).
    """
    candidates = list(costs[group[0].size])
    each = {
        recipes: _seconds(group, recipes, costs, microbatches)
        for recipes in product(candidates, repeat=len(group))
    }
    least = min(map(sum, each.values()))
    near = [recipes for recipes, seconds in each.items() if sum(seconds) <= least * (1 + MARGIN)]
    best = min(near, key=lambda recipes: (sum(map(_rank, recipes)), sum(each[recipes])))
    return [
        RecipeChoice(layer, recipe, seconds, _high(costs[layer.size]))
        for layer, recipe, seconds in zip(group, best, each[best], strict=True)
    ]


def _high(costs: Costs) -> float | None:
    return costs[HIGH_PRECISION].products if HIGH_PRECISION in costs else None


def fragment(choices: Sequence[RecipeChoice], comments: Sequence[str]) -> str:
    """The file's text: comments, and `float8.layer_recipes`."""
    rows = [(f'"{c.layer.pattern}={c.recipe}",', _told(c)) for c in choices]
    width = max(len(text) for text, _ in rows)
    lines = [f"# {line}".rstrip() for line in comments]
    lines += ["", "[float8]", "layer_recipes = ["]
    lines += [f"  {text:<{width}}  # {told}" for text, told in rows]
    return "\n".join([*lines, "]", ""])


def _told(choice: RecipeChoice) -> str:
    gain = ""
    if choice.high_precision is not None:
        high = 1e6 * choice.high_precision
        gain = f", high precision {high:.0f} us: {choice.high_precision / choice.seconds:.2f}x"
    return f"{choice.layer.size}: {1e6 * choice.seconds:.0f} us{gain}"
