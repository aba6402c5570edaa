"""The picture of speedups: figures that are the roofline's, said to be, in a file that stands alone."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.gemm_heatmap import layers_of, main, speedups
from octavo.roofline import Tensors, cast_seconds, find_gpu, gemm_seconds, linear_shapes

SVG = "{http://www.w3.org/2000/svg}"


def test_layers_are_the_model_s_own():
    layers = layers_of("llama3", "8B")
    assert layers["layers.*.attention.wk"] == (4096, 1024)
    assert layers["layers.*.feed_forward.w2"] == (14336, 4096)
    assert layers["output"] == (4096, 128256)
    assert len(layers) == 8


def test_picture_on_paper(tmp_path, capsys):
    out, figures = tmp_path / "x.svg", tmp_path / "x.json"
    flags = ["--gpu", "h200", "--tokens", "512,8192", "--recipes", "rowwise,rowwise_with_gw_hp"]
    assert main([*flags, "--out", str(out), "--json", str(figures)]) == 0
    made = json.loads(figures.read_text())
    assert "NOT MEASURED: the roofline of h200" in made["source"]

    gpu, M, K, N = find_gpu("h200"), 8192, 14336, 4096
    high = sum(gemm_seconds(gpu, shape) for shape in linear_shapes(M, K, N).values())
    low = sum(gemm_seconds(gpu, shape) for shape in linear_shapes(M, K, N, float8=True).values())
    casts = cast_seconds(gpu, Tensors((0, 0, M * K), (0, 0, M * N), K * N), "rowwise", "kernels")
    told = made["speedups"]["rowwise"]["layers.*.feed_forward.w2"]
    assert told[1] == pytest.approx(high / (low + casts))
    assert told[0] < told[1]  # few tokens: the casts of the weight cost as much as before

    texts = ["".join(text.itertext()) for text in ElementTree.parse(out).getroot().iter(f"{SVG}text")]
    assert texts.count(f"{told[1]:.2f}") >= 1
    assert sum(bool(re.fullmatch(r"\d+\.\d\d", text)) for text in texts) == 2 * 2 * 8
    assert any("NOT MEASURED" in text for text in texts)
    assert "href" not in re.sub("xmlns:xlink", "", out.read_text())


def test_speedup_is_high_precision_over_float8():
    found = speedups(
        {"w": (16, 32)}, [8], ["rowwise"], lambda M, K, N, recipe: 3.0 if recipe is None else 2.0
    )
    assert found == {"rowwise": {"w": [1.5]}}


@pytest.mark.parametrize(
    "flags",
    [
        ["--gpu", "h1000"],
        ["--recipes", "colwise"],
        ["--tokens", "0"],
        ["--flavor", "9B"],
        ["--out", "speedups.txt"],
        ["--out", "/proc/nowhere/speedups.svg"],
    ],
)
def test_mistakes_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--gpu", "h100", *flags])
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
