"""Hardware backends: which is chosen and why, and that each computes what emulation does.

No GPU is needed: the calls meant for one run on CPU tensors if the CPU supports the product, and otherwise on
fake CUDA tensors, which enforce the real limits on shapes and layouts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.float8 import (
    FULL,
    RECIPES,
    Cast,
    Float8LinearConfig,
    Gemm,
    ScaleFormat,
    convert_to_float8_training,
    describe_backend,
    gemm_backends,
)
from octavo.float8 import matmul as module
from octavo.float8.gemm_backends import (
    GEMM_BACKENDS,
    Device,
    _scaled_mm_cuda,
    find_backend,
    swizzle_e8m0,
)
from octavo.float8.matmul import _emulate, choose_backend, matmul
from octavo.float8.quantize import Quantized, dequantize, quantize, scale_values
from tests.float8.graphs import compiles
from tests.float8.torchao_reference import relative

CPU = torch.device("cpu")
HOPPER, ADA, BLACKWELL = (Device("cuda", c, (13, 0)) for c in ((9, 0), (8, 9), (10, 0)))
SIZES = [(16, 16, 16), (1, 1, 1), (17, 33, 65), (130, 260, 131)]


def operands(gemm: Gemm, M: int, C: int, N: int, device: str = "cpu") -> tuple[Quantized, Quantized]:
    a, b = torch.randn(M, C, device=device), torch.randn(N, C, device=device)
    return quantize(a, gemm.a), quantize(b, gemm.b)


TENSORWISE = {"tensorwise", "tensorwise_previous_step"}


@pytest.mark.parametrize(
    ("device", "recipes"),
    [
        (Device("cpu"), {*TENSORWISE, "rowwise", "rowwise_with_gw_hp"}),
        (ADA, TENSORWISE),
        (HOPPER, {*TENSORWISE, "rowwise", "rowwise_with_gw_hp", "blockwise"}),
        (Device("cuda", (9, 0), (12, 8)), {*TENSORWISE, "rowwise", "rowwise_with_gw_hp"}),
        (Device("cuda", (8, 0), (13, 0)), set()),
        (Device("mps"), set()),
    ],
)
def test_which_recipes_have_hardware(device: Device, recipes: set[str]) -> None:
    served = {
        name
        for name, recipe in RECIPES.items()
        if all(find_backend(gemm, device) for gemm in recipe.gemms.values() if gemm.float8)
    }
    assert served == recipes


def test_mxfp8_has_hardware_on_blackwell() -> None:
    assert all(find_backend(gemm, BLACKWELL) for gemm in RECIPES["mxfp8"].gemms.values())
    # The same blocks with float32 scales are another format.
    assert find_backend(RECIPES["mxfp8"].with_scales(ScaleFormat.FP32).output, BLACKWELL) is None


def test_the_choice_is_explained() -> None:
    assert describe_backend(RECIPES["rowwise"], CPU, None).startswith("emulated: this CPU")
    assert describe_backend(RECIPES["rowwise"], CPU, True).startswith("emulated: as requested")
    assert describe_backend(RECIPES["rowwise"], CPU, False) == "hardware: torch._scaled_mm"
    assert "1 x 128" in describe_backend(RECIPES["blockwise"], CPU, None)
    with pytest.raises(ValueError, match=r"emulate=False.*1 x 32"):
        describe_backend(RECIPES["mxfp8"], CPU, False)
    assert choose_backend(RECIPES["rowwise"].output, CPU, None) is None
    assert choose_backend(RECIPES["rowwise"].output, CPU, False) is GEMM_BACKENDS[1]


def test_an_older_pytorch_has_fewer_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_backends, "_TORCH", (2, 11))
    assert choose_backend(RECIPES["tensorwise"].output, CPU, False) is GEMM_BACKENDS[0]
    with pytest.raises(ValueError, match=r"torch._scaled_mm needs PyTorch 2\.13 on a cpu"):
        choose_backend(RECIPES["rowwise"].output, CPU, False)
    assert "needs PyTorch 2.13" in describe_backend(RECIPES["rowwise"], CPU, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_the_gpu_call_computes_what_emulation_does(
    recipe: str, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    for gemm in RECIPES[recipe].gemms.values():
        if not gemm.float8:
            continue
        a, b = operands(gemm, *size)
        got = _scaled_mm_cuda(a, b, gemm, dtype)
        assert got.shape == (size[0], size[2])
        assert got.dtype == dtype
        want = _emulate(a, b, gemm.a, gemm.b, dtype)
        assert relative(got, want) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gpu_calls_meet_the_gpus_limits(
    recipe: str, size: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This method asks for a CUDA device even of a fake tensor; cloning does not.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: t.clone(memory_format=torch.contiguous_format))
    device = BLACKWELL if recipe == "mxfp8" else HOPPER
    with FakeTensorMode():
        for gemm in RECIPES[recipe].gemms.values():
            path = find_backend(gemm, device)
            if path is None:
                assert not gemm.float8
                continue
            # Operands as the layer makes them, of which some are transposed views.
            M, C, N = size
            a = quantize(torch.empty(C, M, device="cuda").t(), gemm.a)
            b = quantize(torch.empty(N, C, device="cuda"), gemm.b)
            y = path.run(a, b, gemm, dtype)
            assert y.shape == (M, N)
            assert y.dtype == dtype


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_the_compiler_sees_one_operator_for_a_product_of_blocks(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor lowers `_scaled_mm_v2` to `_scaled_mm`, which refuses such scales: two blocks along C."""
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: t.clone(memory_format=torch.contiguous_format))
    gemm = RECIPES[recipe].output
    path = find_backend(gemm, BLACKWELL if recipe == "mxfp8" else HOPPER)
    with FakeTensorMode():
        a, b = (quantize(torch.empty(256, 256, device="cuda"), cast) for cast in (gemm.a, gemm.b))

        def product(data_a: Tensor, scale_a: Tensor, data_b: Tensor, scale_b: Tensor) -> Tensor:
            return path.run(Quantized(data_a, scale_a), Quantized(data_b, scale_b), gemm, torch.bfloat16)

        nodes = make_fx(dispatch_functionalize(product))(*a, *b).graph.nodes
    products = [str(node.target) for node in nodes if "mm" in str(node.target)]
    assert products == ["octavo.scaled_mm_blocks.default"]


class Calls(TorchDispatchMode):
    """Notes the operators that run under it, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.seen.append((func._schema.name.split("::")[1], args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_rowwise_products_hand_rows_scales_to_the_gpu_and_scale_nothing_themselves(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: t.clone(memory_format=torch.contiguous_format))
    M, C, N = 64, 128, 256
    with FakeTensorMode():
        for name, gemm in RECIPES[recipe].gemms.items():
            if gemm.a is None or gemm.b is None:
                continue
            path = find_backend(gemm, HOPPER)
            assert path is not None
            a = quantize(torch.empty(M, C, device="cuda"), gemm.a)
            b = quantize(torch.empty(N, C, device="cuda"), gemm.b)
            with Calls() as calls:
                path.run(a, b, gemm, torch.bfloat16)
            names = [call for call, _, _ in calls.seen]
            assert names.count("_scaled_mm") == 1
            assert not any(call.startswith(("mul", "div")) for call in names)
            _, args, kwargs = next(call for call in calls.seen if call[0] == "_scaled_mm")
            given = dict(
                zip(("a", "b", "scale_a", "scale_b", "bias", "result", "dtype", "fast"), args, strict=False)
            )
            given |= {"fast": kwargs["use_fast_accum"]} if "use_fast_accum" in kwargs else {}
            assert given["scale_a"].shape == (M, 1)
            assert given["scale_b"].shape == (1, N)
            assert bool(given.get("fast", False)) == (name == "output")


def test_fake_tensors_do_enforce_the_limits() -> None:
    gemm = RECIPES["tensorwise"].output
    with FakeTensorMode():
        a, b = operands(gemm, 16, 24, 16, "cuda")
        with pytest.raises(RuntimeError, match="16"):
            torch._scaled_mm(a.data, b.data.t(), a.scale, b.scale)


ROW, TENSOR = Cast(torch.float8_e4m3fn, (1, FULL)), Cast(torch.float8_e5m2, (FULL, FULL))
EMULATED = {
    **{f"{name}.{gemm}": getattr(RECIPES[name], gemm) for name, gemm in (
        ("tensorwise", "grad_input"), ("rowwise", "output"), ("rowwise_with_gw_hp", "grad_input"),
        ("blockwise", "output"), ("blockwise", "grad_weight"), ("mxfp8", "output"),
    )},
    "rows, float32 scales": Gemm(ROW, ROW),
    "rows by a tensor": Gemm(TENSOR, ROW),
    "bands of rows": Gemm(replace(ROW, block=(48, FULL)), replace(ROW, scale=ScaleFormat.POW2)),
}  # fmt: skip


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EMULATED)
def test_emulation_adds_in_float32_and_rounds_once(
    name: str, out_dtype: torch.dtype, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BFLOAT16_UNITS", units)
    gemm = EMULATED[name]
    a, b = operands(gemm, 130, 260, 131)
    values_a, values_b = dequantize(a, gemm.a.block).double(), dequantize(b, gemm.b.block).double()
    got, want = matmul(a, b, gemm, out_dtype, emulate=True), values_a @ values_b.t()
    assert got.dtype == out_dtype
    terms = values_a.abs() @ values_b.abs().t()
    rounding = 2.0**-8 * want.abs() if out_dtype == torch.bfloat16 else 0.0  # half the step of bfloat16
    assert bool(((got.double() - want).abs() <= 3e-7 * terms + rounding * (1 + 1e-5)).all())


def test_the_units_switch_is_set_for_the_product_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BFLOAT16_UNITS", True)
    precision = torch.backends.mkldnn.matmul
    seen = []

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(precision.fp32_precision)
        return torch.mm(a, b)

    monkeypatch.setattr(module, "_mm", mm)
    before = precision.fp32_precision
    product = torch.ops.octavo.mm_codes
    product(torch.ones(2, 3), torch.ones(3, 4), [], torch.float32)
    assert (seen, precision.fp32_precision) == (["bf16"], before)
    with pytest.raises(RuntimeError):
        product(torch.ones(2, 3), torch.ones(2, 4), [], torch.float32)
    assert precision.fp32_precision == before


@compiles
@pytest.mark.skipif(gemm_backends._TORCH < (2, 13), reason="2.11 has no rowwise product on a CPU")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_native_path_of_a_cpu_compiles(recipe: str) -> None:
    torch.manual_seed(0)
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=False)
    linear = convert_to_float8_training(nn.Linear(64, 32, dtype=torch.bfloat16), config=config)
    x = torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for layer in (linear, torch.compile(linear, fullgraph=True)):
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, linear.weight))))
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


def test_swizzled_scales_have_the_formats_order() -> None:
    rows, cols = 200, 6
    scale = torch.randint(0, 255, (rows, cols), dtype=torch.uint8)
    flat = swizzle_e8m0(scale).view(torch.uint8)
    assert flat.numel() == 256 * 8
    for r, c in [(0, 0), (31, 3), (32, 0), (127, 2), (128, 4), (199, 5)]:
        tile = (r // 128) * 2 + c // 4
        assert flat[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] == scale[r, c]
    assert bool((scale_values(flat[[512 * 2 - 1]]) == 1).all())  # padding


def test_products_of_nothing_and_of_what_does_not_match() -> None:
    gemm = RECIPES["rowwise"].output
    for M, C, N in [(0, 16, 4), (3, 0, 4), (3, 16, 0)]:
        y = matmul(*operands(gemm, M, C, N), gemm, torch.float32)
        assert torch.equal(y, torch.zeros(M, N))
    a, _ = operands(gemm, 4, 16, 4)
    _, b = operands(gemm, 4, 32, 4)
    with pytest.raises(ValueError, match=r"\(4, 16\) and \(4, 32\)"):
        matmul(a, b, gemm, torch.float32)
