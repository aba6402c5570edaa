"""What a size costs: measured, remembered, and on paper."""

import json

import pytest
import torch

from octavo.commands.tune import cost_cache, recipe_costs
from octavo.commands.tune.linear_sizes import Size
from octavo.config import names
from octavo.roofline import GPUS, find_gpu

CPU = torch.device("cpu")
SMALL, WIDE = Size(32, 64, 48), Size(8192, 4096, 14336)


def test_measured():
    """Every recipe, and each of its parts, has a time of its own."""
    found = recipe_costs.measure_costs(SMALL, recipe_costs.CANDIDATES, CPU, rounds=2, emulate=True)
    assert {"high_precision", "tensorwise", "rowwise", "blockwise"} <= set(found)
    assert set(found) <= {"high_precision", *names.RECIPES}
    for name, parts in found.items():
        assert parts.products > 0
        if name == "high_precision":
            assert parts.input == parts.gradient == parts.weight == 0
        else:
            assert min(parts.input, parts.gradient, parts.weight) > 0


def test_on_paper():
    found = recipe_costs.predict_costs(
        WIDE, ["high_precision", "rowwise", "rowwise_with_gw_hp"], find_gpu("h100")
    )
    high, row, hp = found.values()
    # 3 x 0.96 TFLOP at some 765 and 1297 TFLOP/s.
    assert high.products == pytest.approx(3 * 0.962e12 / 765e12, rel=0.08)
    assert row.products == pytest.approx(high.products * 765 / 1297, rel=0.08)
    assert row.products < hp.products < high.products
    assert hp.products == pytest.approx((high.products + 2 * row.products) / 3, rel=0.02)
    assert row.gradient == pytest.approx(row.input * 14336 / 4096, rel=0.12)
    small = recipe_costs.predict_costs(Size(64, 64, 64), ["rowwise"], find_gpu("h100"))["rowwise"]
    assert min(small.input, small.gradient, small.weight) >= 12e-6  # launches


@pytest.mark.parametrize(
    ("gpu", "able"),
    [
        ("a100", []),
        ("l40s", ["tensorwise"]),
        ("h200", ["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"]),
    ],
)
def test_recipes_that_a_gpu_runs(gpu, able):
    found, unable = recipe_costs.supported_by_model(["high_precision", *able, "mxfp8"], find_gpu(gpu))
    assert found == ["high_precision", *able]
    assert set(unable) == {"mxfp8"}
    if gpu == "l40s":
        assert recipe_costs.supported_by_model(["rowwise"], find_gpu(gpu))[0] == []


def test_every_gpu_with_float8_units_has_a_capability():
    assert {g.name for g in GPUS.values() if g.float8 and g.name != "mi300x"} == set(
        recipe_costs._CAPABILITIES
    )


def test_recipes_that_this_device_runs():
    able, unable = recipe_costs.supported_recipes(["high_precision", "tensorwise", "blockwise"], CPU)
    assert able == ["high_precision", "tensorwise"]
    assert "no cpu backend multiplies blocks of 1 x 128" in unable["blockwise"]


def test_cache(tmp_path):
    path = tmp_path / "deep" / "tune.json"
    measured = {
        "high_precision": recipe_costs.CostParts(2.0),
        "rowwise": recipe_costs.CostParts(1.0, 0.1, 0.2, 0.3),
    }
    first = cost_cache.CostCache(path, "H100; torch 2.13")
    assert first.look_up(SMALL, ["rowwise"]) is None
    assert first.store(SMALL, measured) is None
    assert cost_cache.CostCache(path, "H100; torch 2.14").look_up(SMALL, ["rowwise"]) is None
    cost_cache.CostCache(path, "H200").store(SMALL, {"high_precision": recipe_costs.CostParts(9.0)})
    again = cost_cache.CostCache(path, "H100; torch 2.13")
    assert again.look_up(SMALL, ["rowwise", "high_precision"]) == measured
    assert again.look_up(SMALL, ["rowwise", "tensorwise"]) is None  # all of a comparison, or none
    assert again.look_up(WIDE, ["rowwise"]) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}', '{"format": 0, "machines": {"m": {}}}'])
def test_a_broken_cache_is_an_empty_one(tmp_path, text):
    path = tmp_path / "tune.json"
    path.write_text(text)
    broken = cost_cache.CostCache(path, "m")
    assert broken.look_up(SMALL, ["rowwise"]) is None
    assert broken.store(SMALL, {"rowwise": recipe_costs.CostParts(1.0)}) is None
    assert json.loads(path.read_text())["machines"]["m"][str(SMALL)]["rowwise"]["products"] == 1.0


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    told = cost_cache.CostCache(tmp_path / "file" / "tune.json", "m").store(
        SMALL, {"rowwise": recipe_costs.CostParts(1.0)}
    )
    assert told is not None
    assert "tune.json" in told


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cost_cache.default_cache_path() == tmp_path / "octavo" / "tune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cost_cache.default_cache_path().parts[-3:] == (".cache", "octavo", "tune.json")
    assert torch.__version__ in cost_cache.describe_machine(CPU)
