"""Laws of one Llama3-8B layer's traffic on a GPU, read off its graphs; see benchmarks/layer_traffic.py.

A law that does not hold yet is a strict expected failure with its figure, so that mending it is noticed.
"""

from __future__ import annotations

import re
from functools import cache

import pytest

from benchmarks.layer_traffic import TOKENS, TracedLayer, line, table, trace_layer
from octavo.roofline import LLAMA3_8B, cast_bytes
from tests.float8.graphs import compiles
from tests.float8.kernels import needs

pytestmark = [
    needs.triton,
    needs.compiler,
    compiles,
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
SAVING = ("tensorwise", "rowwise", "blockwise", "mxfp8", "tensorwise_previous_step")
EVERY = (*SAVING, "rowwise_with_gw_hp")
QUICK = {("rowwise", False), ("rowwise", True), ("tensorwise", True)}
PARTIAL_MAXIMA = 1.06
"""Maxima of strips of 32 rows are written and read besides the casts."""


@cache
def traced(recipe: str | None, fused: bool) -> TracedLayer:
    return trace_layer(recipe, fused=fused)


def layers(recipes: tuple[str, ...], failing: dict[tuple[str, bool], str] | None = None) -> list:
    """(recipe, fused): a few by default, the rest marked slow; `failing`: why a law does not hold."""
    cases = []
    for case in ((recipe, fused) for recipe in recipes for fused in (False, True)):
        marks = [] if case in QUICK else [pytest.mark.slow]
        if failing and case in failing:
            marks.append(pytest.mark.xfail(reason=failing[case], strict=True))
        cases.append(pytest.param(*case, marks=marks, id=f"{case[0]}{'-fused' * case[1]}"))
    return cases


@pytest.mark.parametrize(("recipe", "fused"), [(None, False), *layers(EVERY)])
def test_the_roofline_counts_these_bytes(recipe: str | None, fused: bool) -> None:
    found = traced(recipe, fused)
    layer, block = found.layer, LLAMA3_8B
    moved = layer.total("producer") + layer.total("elementwise")
    narrow = recipe not in (None, "rowwise_with_gw_hp")

    # blockwise also transposes the scales of 1 x 128 blocks for its products
    assert sum(block.elementwise_bytes(TOKENS, fused=fused)) == pytest.approx(moved, rel=0.035)
    assert block.saved(TOKENS)["kernels" if narrow else "all"] == pytest.approx(
        sum(layer.saved.values()), rel=0.01
    )
    if recipe is None:
        assert layer.total("cast") == 0
        return
    way, tensors = ("fused", block.fused_tensors) if fused else ("kernels", block.cast_tensors)
    casts = cast_bytes(tensors(TOKENS), recipe, way)
    assert casts == pytest.approx(found.cast_bytes, rel=0.01)


@pytest.mark.parametrize(("recipe", "fused"), layers(EVERY))
def test_each_tensor_is_cast_once_and_shared(recipe: str, fused: bool) -> None:
    times = traced(recipe, fused).layer.times_cast()

    assert len(times) > 10
    assert {operand: count for operand, count in times.items() if count > 1} == {}


SEPARATE = {("rowwise_with_gw_hp", fused): "8.0: two kinds of scales" for fused in (False, True)}


@pytest.mark.parametrize(("recipe", "fused"), layers(EVERY, SEPARATE))
def test_weights_are_cast_both_ways_once_per_step(recipe: str, fused: bool) -> None:
    layer = traced(recipe, fused)
    cast = layer.weights.times_cast()
    limit = 4 if recipe in ("blockwise", "mxfp8") else 6

    assert layer.weights.total("cast") <= limit * PARTIAL_MAXIMA * layer.parameters
    assert sum(count for (_, way), count in cast.items() if way == "rows") == 7
    names = [launch.operand for launch in layer.layer.launches]
    assert not [name for name in names if "weight" in name]  # none is cast again within a microbatch


ABOVE = {
    "tensorwise": "3.84 GB: 2.53 and the weights' 1.31",
    "rowwise": "4.00 GB: 2.63 and the weights' 1.37",
}


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, marks=pytest.mark.xfail(reason=why, strict=True)) for r, why in ABOVE.items()]
)
def test_casts_of_a_fused_layer(recipe: str) -> None:
    assert traced(recipe, True).cast_bytes <= 3.4e9


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_casts_of_a_fused_layer_in_a_step_of_two_microbatches(recipe: str) -> None:
    """They share the weights' casts."""
    found = traced(recipe, True)

    assert found.layer.total("cast") + found.weights.total("cast") / 2 <= 3.4e9


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_an_unfused_layer_moves_little_more(recipe: str) -> None:
    """In all: kernels that also compute maxima move more, and the casts after them less."""
    plain, fused = (sum(launch.bytes for launch in traced(recipe, f).layer.launches) for f in (False, True))

    assert plain <= 1.15 * fused


@pytest.mark.parametrize("recipe", ["tensorwise"])
def test_maxima_of_producers_are_used(recipe: str) -> None:
    launches = traced(recipe, True).layer.launches
    produced = ("rms_norm.", "add_rms_norm", "silu_mul")
    again = [c for c in launches if "_magnitudes" in c.name and c.operand.startswith(produced)]

    assert again == []


@pytest.mark.parametrize(
    ("recipe", "fused"),
    layers(SAVING),
)
def test_saved_for_backward(recipe: str, fused: bool) -> None:
    kept, wide = (sum(traced(*which).layer.saved.values()) for which in ((recipe, fused), (None, False)))

    assert round(kept / wide, 2) <= 0.87


@pytest.mark.parametrize(
    "recipe",
    [
        "rowwise",
        *(pytest.param(r, marks=pytest.mark.slow) for r in ("tensorwise", "blockwise", "rowwise_with_gw_hp")),
    ],
)
def test_saved_if_the_input_of_w2_is_made_again(recipe: str) -> None:
    layer = trace_layer(recipe, fused=True, recompute=True).layer
    limit = 0.81 if recipe in SAVING else 0.82  # of gw_hp the other operands stay in bfloat16

    assert sum(layer.saved.values()) <= limit * sum(traced(None, False).layer.saved.values())
    assert max(layer.times_cast().values()) == 1


def test_the_tables_name_kernels_and_operands() -> None:
    fused = traced("rowwise", True)
    shown = table(fused.layer)

    assert re.search(r"backward +producer +704.\d +506.\d +silu_mul._backward", shown)
    assert re.search(
        r"backward +cast .*_cast_given_maxima +silu_mul_backward.0 \w+ by rows and columns", shown
    )
    assert re.search(r"saved +469.8 MB +_scaled_mm", shown)  # w1's and w3's outputs, of which views are kept
    assert line("rowwise fused", fused, traced(None, False)).startswith("rowwise fused ")
