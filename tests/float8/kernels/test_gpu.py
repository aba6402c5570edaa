"""Kernels on hardware against the reference on a CPU, bit for bit: `pytest -m gpu tests/float8/kernels`."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from octavo.float8 import RECIPES, Float8AdamW, Float8Linear, ScaleFormat
from octavo.float8.casts.gpu_cast import LEAST_CAPABILITY, supports, use_kernels
from octavo.float8.matmul import describe_backend
from tests.float8.graphs import compiles, gradients

pytestmark = [
    pytest.mark.gpu,
    compiles,
    pytest.mark.filterwarnings("ignore::octavo.float8.matmul.EmulationWarning"),
    # What a GPU emulates is multiplied in float32 on purpose.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    # triton 3.9 tells of a default that will change; casts have no sum that a product could fuse with.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]

if torch.cuda.is_available():
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        pytest.skip(
            f"needs compute capability {LEAST_CAPABILITY} to convert to float8", allow_module_level=True
        )
    from tests.float8.kernels import against_reference as check

    CONFIGURATIONS = check.CONFIGURATIONS
    KERNELS = list(check.KERNELS)
else:  # collected, and skipped, without triton
    CONFIGURATIONS = [(None, "", {}, "")]
    KERNELS = [""]

# Ragged, aligned, past one row of programs, and past what a program can hold of a row.
SHAPES = [(1, 1), (130, 200), (512, 1024), (4100, 4096), (300, 14336), (64, 28672)]


def test_conversions() -> None:
    check.check_widening("cuda")
    for dtype in check.FLOAT8:
        check.check_conversion(check.every_bfloat16("cuda"), dtype)
        check.check_conversion(check.float32_points("cuda", 4_000_000), dtype)


@pytest.mark.parametrize("scales", ScaleFormat, ids=lambda scales: scales.value)
def test_scales(scales: ScaleFormat) -> None:
    for dtype in check.FLOAT8:
        check.check_scales(check.float32_points("cuda", 4_000_000, non_negative=True), dtype, scales)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_casts(name: str, shape: tuple[int, int]) -> None:
    for source in check.DTYPES:
        for feature in ("spread", "nan"):
            x = check.make_x(shape, source, feature).cuda()
            for dtype, scales in ((check.E4M3, ScaleFormat.POW2), (check.E5M2, ScaleFormat.FP32)):
                check.check_cast(check.KERNELS[name], x, dtype, scales)
            check.check_cast(check.KERNELS[name], x, check.E4M3, ScaleFormat.E8M0, rows=False)


@pytest.mark.parametrize("name", KERNELS)
def test_hard_values(name: str) -> None:
    for feature in check.FEATURES:
        x = check.make_x((130, 200), torch.bfloat16, feature).cuda()
        for scales in ScaleFormat:
            check.check_cast(check.KERNELS[name], x, check.E4M3, scales)


@pytest.mark.parametrize(("module", "name", "config", "user"), CONFIGURATIONS)
def test_configurations(module: ModuleType, name: str, config: dict, user: str) -> None:
    check.check_configuration(module, name, config, user, "cuda")


@pytest.mark.parametrize("shape", [(130, 200), (1030, 4096)], ids=str)
def test_silu_mul(shape: tuple[int, int]) -> None:
    from octavo.float8.kernels import silu_mul as kernels

    a, b, dh = (check.make_x(shape, torch.bfloat16, "spread", seed).cuda() for seed in (1, 2, 3))
    made = (kernels.silu_mul(a, b), *kernels.silu_mul_backward(dh, a, b))
    want = (kernels.reference(a, b), *kernels.reference_backward(dh, a, b))
    for one, other in zip(made, want, strict=True):
        torch.testing.assert_close(one[0], other, rtol=2**-6, atol=1e-6)
        check.check_given_maxima(*one)


@pytest.mark.parametrize("shape", [(130, 200), (1030, 4096), (100, 8192)], ids=str)
def test_add_rms_norm(shape: tuple[int, int]) -> None:
    from octavo.float8.kernels import add_rms_norm as kernels

    x, residual, dy, dh = (check.make_x(shape, torch.bfloat16, "spread", seed).cuda() for seed in range(4))
    w = torch.linspace(0.5, 1.5, shape[1], device="cuda", dtype=torch.bfloat16)
    h, rms, y = kernels.add_rms_norm(x, residual, w, 1e-5)
    dx, dw = kernels.add_rms_norm_backward(dy, dh, h, rms, w)
    want_h, want_rms, want_y = kernels.reference(x, residual, w, 1e-5)
    want_dx, want_dw = kernels.reference_backward(dy, dh, h, rms, w)
    assert torch.equal(h, want_h)
    torch.testing.assert_close(rms, want_rms, rtol=1e-6, atol=0)
    torch.testing.assert_close(dw, want_dw, rtol=1e-4, atol=1e-3)
    for one, other in ((y, want_y), (dx, want_dx)):
        torch.testing.assert_close(one[0], other, rtol=2**-6, atol=1e-3)
        check.check_given_maxima(*one)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_with_kernels_equals_one_without(recipe: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Float8Linear(256, 384, config=recipe, bias=False, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(512, 256).to("cuda", torch.bfloat16)
    cast = RECIPES[recipe].output.a
    assert supports(x, cast)
    # Emulated products are float32 ones, which add in an order that depends on the operands' strides.
    emulated = describe_backend(RECIPES[recipe], x.device, None).startswith("emulated")
    tolerance = {"rtol": 2**-7, "atol": 1e-4} if emulated else {"rtol": 0, "atol": 0}
    with use_kernels(False):
        want = gradients(model, model, x)
    for run in (model, torch.compile(model, fullgraph=True)):
        for got, wanted in zip(gradients(run, model, x), want, strict=True):
            torch.testing.assert_close(got, wanted, **tolerance)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_tuning_does_not_change_the_weights(recipe: str) -> None:
    """The optimizer's kernels write in place: however often they are timed, one step is one step."""
    weights = []
    for kernels in (True, False):
        torch.manual_seed(0)
        model = Float8Linear(512, 384, config=recipe, bias=False, device="cuda")
        optimizer = Float8AdamW(model.parameters(), model=model, lr=1e-2)
        with use_kernels(kernels):
            for _ in range(2):
                model(torch.ones(256, 512, device="cuda")).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
