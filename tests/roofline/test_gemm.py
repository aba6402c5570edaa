"""Products after their shape, and the table of GPUs."""

import pytest

from octavo.roofline import GPUS, Shape, find_gpu, gemm_seconds, gpu_of, linear_shapes
from octavo.roofline.gemm import shape_efficiency

H100 = GPUS["h100"]


def rate(M, K, N, *, float8=False):
    shape = Shape(M, K, N, float8)
    return shape.flops / gemm_seconds(H100, shape)


def test_the_quoted_product_reaches_the_quoted_rate():
    assert rate(8192, 8192, 8192) == pytest.approx(765e12, rel=0.01)
    assert rate(8192, 8192, 8192, float8=True) == pytest.approx(1297e12, rel=0.01)


def test_waves_are_quantised():
    full = shape_efficiency(128 * 132, 4096, 256, sms=132)
    one_more = shape_efficiency(128 * 132 + 1, 4096, 256, sms=132)
    assert full / one_more > 1.3
    assert full <= 1


def test_narrow_products_lose_more_in_float8():
    narrow = rate(8192, 4096, 1024) / rate(8192, 4096, 14336)
    narrow_float8 = rate(8192, 4096, 1024, float8=True) / rate(8192, 4096, 14336, float8=True)
    assert narrow_float8 < narrow < 1


def test_small_products_wait_for_memory():
    small = Shape(16, 4096, 4096)
    assert gemm_seconds(H100, small) > small.bytes / H100.hbm


def test_the_three_products_do_the_same_work_in_other_orders():
    shapes = linear_shapes(8192, 4096, 14336)
    assert {shape.flops for shape in shapes.values()} == {2.0 * 8192 * 4096 * 14336}
    assert (shapes["grad_input"].K, shapes["grad_weight"].K) == (14336, 8192)


@pytest.mark.parametrize("name", ["h100", "H100-NVL", "h100_pcie", "RTX4090"])
def test_gpus_by_the_name_that_a_command_takes(name):
    assert find_gpu(name) in GPUS.values()


def test_an_unknown_gpu_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'h1000'.*h100, .*mi300x"):
        find_gpu("h1000")
    assert gpu_of("NVIDIA GeForce GTX 1080") is None


@pytest.mark.parametrize(
    ("driver_name", "known_as"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H100 64GB HBM2", None),
        ("NVIDIA H100 80GB HBM2e", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H100-20C", None),
        ("NVIDIA A100-4-20C", None),
        ("NVIDIA L40S-12Q", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H20", None),
        ("NVIDIA H800", None),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", None),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_driver_name_is_this_gpu_or_none(driver_name, known_as):
    found = gpu_of(driver_name)
    assert (found and found.name) == known_as


def test_ceilings_lie_below_peaks_and_float8_above_bf16():
    for gpu in GPUS.values():
        assert gpu.bf16_ceiling < gpu.bf16
        assert gpu.float8 is None or gpu.bf16_ceiling < gpu.float8_ceiling < gpu.float8
        assert gpu.network < gpu.link
