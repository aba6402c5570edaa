"""The recipe of a layer, given what each costs, and the file that says so."""

import tomllib

import pytest

from octavo.commands.tune.choice import choose, layer_recipes_toml
from octavo.commands.tune.linear_sizes import Layer, Size
from octavo.commands.tune.recipe_costs import CostParts
from octavo.config.layer_recipes import parse

SIZE, OTHER = Size(8, 16, 16), Size(8, 16, 32)


def layer(name="wq", size=SIZE):
    return Layer(f"layers.*.{name}", size, 4)


def chosen(group, costs, **microbatches):
    return [c.recipe for c in choose(group, costs, microbatches)]


def test_the_fastest_with_its_casts():
    costs = {
        SIZE: {
            "high_precision": CostParts(10),
            "tensorwise": CostParts(5, 2, 2, 2),
            "rowwise": CostParts(5, 3, 2, 1),
        }
    }
    assert chosen((layer(),), costs) == ["high_precision"]  # 11 and 11 with all casts
    assert chosen((layer(),), costs, tensorwise=4, rowwise=4) == ["tensorwise"]  # 9.5 and 10.25


def test_linears_with_one_input_pay_its_cast_once():
    costs = {SIZE: {"high_precision": CostParts(10), "rowwise": CostParts(7, 4, 1)}}
    assert chosen((layer(),), costs) == ["high_precision"]  # 12
    assert chosen((layer("wq"), layer("wk"), layer("wv")), costs) == ["rowwise"] * 3  # 28 instead of 30
    # One that gains nothing itself stays out where it is large, and the others carry the cast.
    costs[OTHER] = {"high_precision": CostParts(10), "rowwise": CostParts(12, 4, 1)}
    group = (layer("wq"), layer("wk"), layer("wv"), layer("wx", OTHER))
    choices = choose(group, costs, {})
    assert [c.recipe for c in choices] == ["rowwise"] * 3 + ["high_precision"]
    assert choices[0].seconds == pytest.approx(7 + 1 + 4 / 3)
    assert choices[3].seconds == 10 == choices[3].high_precision


def test_within_noise_the_more_precise():
    costs = {
        SIZE: {
            "tensorwise": CostParts(1.0),
            "rowwise": CostParts(1.01),
            "rowwise_with_gw_hp": CostParts(1.03),
        }
    }
    assert chosen((layer(),), costs) == ["rowwise"]
    costs[SIZE]["rowwise_with_gw_hp"] = CostParts(1.02)
    assert chosen((layer(),), costs) == ["rowwise_with_gw_hp"]


def test_the_file_reads_back():
    costs = {
        SIZE: {"high_precision": CostParts(3e-6), "rowwise": CostParts(1e-6)},
        OTHER: {"high_precision": CostParts(1.0)},
    }
    choices = choose((layer("wq"),), costs, {}) + choose((layer("wk", OTHER),), costs, {})
    text = layer_recipes_toml(choices, ["made for a test", "twice"])
    assert text.startswith("# made for a test\n# twice\n\n[float8]\n")
    assert "M=8 K=16 N=16: 1 us, high precision 3 us: 3.00x" in text
    written = tomllib.loads(text)["float8"]["layer_recipes"]
    assert [(parse(w).pattern, parse(w).recipe) for w in written] == [
        ("layers.*.wq", "rowwise"),
        ("layers.*.wk", None),
    ]
