"""On a GPU: every benchmark's smoke, `octavo tune`, products against emulation, compiled against eager."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from octavo.float8 import RECIPES, Float8Linear
from octavo.float8.matmul import choose_backend, matmul
from octavo.float8.quantize import quantize
from tests.float8.graphs import compiles

pytestmark = [pytest.mark.gpu, compiles]
ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ("gemm", "cast_bandwidth", "layer_stack", "full_model")
ELDER = ("health", "emulation", "loop_overhead", "checkpoint")


def run(*argv):
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", BENCHMARKS)
def test_smoke(name, tmp_path):
    run(f"benchmarks/{name}.py", "--smoke", "--out", str(tmp_path))
    (file,) = tmp_path.glob("*.json")
    whole = json.loads(file.read_text())
    assert whole["machine"]["kind"] == "cuda"
    assert whole["comparisons"]
    for comparison in whole["comparisons"]:
        for side in comparison["sides"].values():
            assert side["ms"]["median"] > 0


@pytest.mark.parametrize("name", ELDER)
def test_elder_smoke(name):
    run(f"benchmarks/{name}.py", "--smoke")


def test_tune(tmp_path):
    out = tmp_path / "tuned.toml"
    argv = ["tune", "--config-file", "debug_model.toml", "--no-cache", "--out", str(out)]
    told = run("-m", "octavo.cli", *argv)
    assert "measured on " in told
    assert "ESTIMATED" not in out.read_text()
    assert len(tomllib.loads(out.read_text())["float8"]["layer_recipes"]) == 7


def hardware_gemms():
    for name, recipe in RECIPES.items():
        for product, gemm in recipe.gemms.items():
            if gemm.float8:
                yield pytest.param(gemm, id=f"{name} {product}")


@pytest.mark.parametrize("gemm", list(hardware_gemms()))
@pytest.mark.parametrize("shape", [(256, 512, 384), (130, 272, 96), (2048, 4096, 1024)], ids=str)
def test_products(gemm, shape):
    """Hardware against emulation of the same operands. Accumulation of 14 bits costs most with fast_accum."""
    device = torch.device("cuda")
    try:
        choose_backend(gemm, device, False)
    except ValueError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    M, C, N = shape
    a, b = (torch.randn(rows, C, device=device, dtype=torch.bfloat16) for rows in (M, N))
    operands = quantize(a, gemm.a), quantize(b, gemm.b)
    got = matmul(*operands, gemm, torch.bfloat16, emulate=False).double()
    want = matmul(*operands, gemm, torch.float32, emulate=True).double()
    noise = (got - want).square().sum()
    sqnr = 10 * torch.log10(want.square().sum() / noise).item()
    assert sqnr > (40 if gemm.fast_accum else 45)


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"])
def test_compiled_equals_eager(name):
    """Casts and products are the same kernels, so the results are the same bits."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    layer = Float8Linear.from_float(linear, name)
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), leaf.grad, layer.weight.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
