"""The physics of one Llama3-8B layer at 8192 tokens, as the project's targets quote it, out of shapes alone.

What is derived exactly: FLOPs, times at the rates that are quoted with them, elementwise bytes, memory. What
is fitted: the share of bandwidth that torchao's compiled casts reach (two numbers for four speedups). What
the quoted figures leave open: over how many microbatches of a step weights are cast once; four give the
quoted traffic. Our goals are not derived, since they say what kernels shall reach: they must lie between
torchao's and what the model allows.
"""

import pytest

from octavo.roofline import GPUS, LLAMA3_8B, cast_bytes, layer_time
from octavo.roofline.devices import FLASH_ATTENTION_2

T = 8192
RATES = (700e12, 1300e12)
H100, H200 = GPUS["h100"], GPUS["h200"]


def near(value, percent=2.0):
    return pytest.approx(value, rel=percent / 100)


def time(gpu, recipe=None, **how):
    return layer_time(gpu, LLAMA3_8B, T, T, recipe, gemm_rates=RATES, microbatches=4, **how)


def speedup(gpu, recipe, way):
    return time(gpu).total / time(gpu, recipe, way=way).total


def test_products():
    assert sum(shape.flops for shape in LLAMA3_8B.gemms(T)) == near(10.72e12, 0.1)
    assert len(LLAMA3_8B.gemms(T)) == 21
    assert time(H100).gemms == near(15.3e-3, 0.5)
    assert time(H100, "rowwise").gemms == near(8.25e-3, 0.5)


def test_attention():
    assert LLAMA3_8B.attention_flops(T, T) == near(1.92e12, 0.5)
    assert time(H100).attention == near(3.8e-3)
    assert time(H100, attention_rates=FLASH_ATTENTION_2).attention == near(6.4e-3)


def test_elementwise():
    """Quoted with two digits; compiled layers move 4 % more than the least."""
    assert time(H100).elementwise == near(1.3e-3, 5)
    assert time(H200).elementwise == near(0.9e-3, 5)


@pytest.mark.parametrize(
    ("recipe", "way", "gigabytes", "percent"),
    [
        ("tensorwise", "torchao", 5.4, 3),
        ("rowwise", "torchao", 7.2, 1),
        ("tensorwise", "producers", 2.5, 1),
        ("rowwise", "producers", 2.5, 1),
        ("rowwise", "transpose", 1.0, 6),  # quoted with two digits
        ("tensorwise", "previous", 0.5, 6),
    ],
)
def test_traffic_of_casts(recipe, way, gigabytes, percent):
    tensors = LLAMA3_8B.cast_tensors(T)
    assert cast_bytes(tensors, recipe, way, microbatches=4) / 1e9 == near(gigabytes, percent)


def test_free_casts():
    for gpu, quoted in ((H100, 1.53), (H200, 1.55)):
        free = time(gpu, "rowwise").total - time(gpu, "rowwise").casts
        assert time(gpu).total / free == near(quoted, 0.5)


@pytest.mark.parametrize(
    ("gpu", "recipe", "quoted"),
    [
        (H100, "rowwise", 1.17),
        (H100, "tensorwise", 1.27),
        (H200, "rowwise", 1.26),
        (H200, "tensorwise", 1.35),
    ],
)
def test_torchao(gpu, recipe, quoted):
    assert speedup(gpu, recipe, "torchao") == near(quoted, 1.5)


@pytest.mark.parametrize(
    ("gpu", "recipe", "way", "goal"),
    [
        (H100, "rowwise", "producers", 1.38),
        (H100, "tensorwise", "producers", 1.40),
        (H100, "tensorwise", "previous", 1.47),
        (H100, "rowwise", "transpose", 1.45),
        (H200, "rowwise", "producers", 1.42),
        (H200, "tensorwise", "producers", 1.45),
        (H200, "tensorwise", "previous", 1.50),
        (H200, "rowwise", "transpose", 1.49),
    ],
)
def test_goals_are_within_reach(gpu, recipe, way, goal):
    allowed = speedup(gpu, recipe, way)
    assert speedup(gpu, recipe, "torchao") < goal < allowed < goal * 1.04


def test_the_ratio_over_torchao_within_one_recipe():
    for recipe, quoted in (("rowwise", 1.18), ("tensorwise", 1.10)):
        ratio = speedup(H100, recipe, "producers") / speedup(H100, recipe, "torchao")
        assert quoted < ratio < quoted * 1.05


def test_memory_of_the_activations_of_32_layers():
    saved = {way: 32 * bytes_ / 1e9 for way, bytes_ in LLAMA3_8B.saved(T).items()}
    quoted = {"all": 36.5, "recomputed": 24.7, "float8": 20.4, "tight": 17.2}
    assert {way: saved[way] for way in quoted} == pytest.approx(quoted, rel=0.002)


def test_joined_linears_are_the_same_work_in_fewer_products():
    joined = LLAMA3_8B.gemms(T, "rowwise", joined=True)
    assert len(joined) == 12
    assert sum(s.flops for s in joined) == sum(s.flops for s in LLAMA3_8B.gemms(T))
    separate, one = (layer_time(H100, LLAMA3_8B, T, T, "rowwise", joined=j) for j in (False, True))
    assert one.gemms < separate.gemms


def test_memory_of_weights_gradients_and_8_bit_moments():
    vocabulary, layers = 128_256, 32
    norms = (2 * layers + 1) * LLAMA3_8B.dim
    parameters = layers * LLAMA3_8B.weights + 2 * vocabulary * LLAMA3_8B.dim + norms
    scales = 2 * 4 / 256  # a float32 maximum for each 256 elements of each moment (arXiv:2110.02861)
    assert parameters * (2 + 2 + 2 + scales) / 1e9 == near(48.4, 0.2)


def test_weights_are_cast_once_a_step_by_ours_and_every_time_by_torchao():
    tensors = LLAMA3_8B.cast_tensors(T)
    for way, shared in (("producers", True), ("previous", True), ("torchao", False)):
        one, many = (cast_bytes(tensors, "tensorwise", way, microbatches=n) for n in (1, 100))
        assert (many < one) is shared


def test_a_gpu_without_float8_units_gains_nothing():
    a100 = GPUS["a100"]
    assert layer_time(a100, LLAMA3_8B, T, T, "tensorwise").gemms >= layer_time(a100, LLAMA3_8B, T, T).gemms
