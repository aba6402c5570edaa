"""A page on a trace: times against a trace made by hand, on torn and long traces, and on a real one."""

import gzip
import io
import json
import re

import pytest
import torch

from octavo.config.schema import Profiling
from octavo.metrics import profiler as profiling_module
from octavo.metrics.profiler import profiling
from octavo.metrics.trace_summary import (
    ATTENTION,
    CASTS,
    COMMUNICATION,
    FLOAT8,
    GEMM,
    OTHER,
    events_of,
    kind_of,
    main,
    page,
    summarise,
    summarise_file,
)


def kernel(name, start, duration, stream=7):
    return {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": stream, "ts": start, "dur": duration}


# Microseconds. One step of 1000: 300 of float8, 100 of casts, 200 of bf16, 150 of attention, 200 of
# communication of which 150 lie behind computation; nothing from 800 on.
STEP = {
    "ph": "X",
    "cat": "user_annotation",
    "name": "ProfilerStep#9",
    "ts": 0,
    "dur": 1000,
    "pid": 1,
    "tid": 1,
}
CUDA = [
    STEP,
    {**STEP, "cat": "gpu_user_annotation", "dur": 5000},
    {"ph": "M", "name": "process_name"},
    kernel("void cutlass::device_kernel<e4m3 gemm sm90_>", 0, 300),
    kernel("_cast_rows", 300, 60),
    kernel("triton_red_fused__to_copy_abs_amax_clamp_mul_0", 360, 40),
    kernel("nvjet_hsh_128x256_64x4_bf16", 400, 200),
    kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", 600, 150),
    kernel("ncclDevKernel_AllGather_RING_LL", 600, 200, stream=20),
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 10, "dur": 5, "pid": 1, "tid": 1},
]


def trace(events, path=None):
    text = json.dumps({"schemaVersion": 1, "traceEvents": events, "traceName": "x"}, indent=1)
    return io.StringIO(text) if path is None else path.write_text(text)


def test_kernels_by_hand():
    summary = summarise(events_of(trace(CUDA)))
    micro = {kind: round(1e6 * seconds, 3) for kind, seconds in summary.kinds.items()}
    assert micro == {FLOAT8: 300, CASTS: 100, GEMM: 200, ATTENTION: 150, COMMUNICATION: 200}
    assert summary.wall == pytest.approx(1000e-6)
    assert summary.idle == pytest.approx(200e-6)
    assert summary.exposed == pytest.approx(50e-6)
    assert summary.quantisation == pytest.approx(0.1)
    assert not summary.cut_off


def test_operators_count_their_own_time_and_what_a_product_calls_is_its_own():
    def op(name, start, duration, thread=1):
        return {
            "ph": "X",
            "cat": "cpu_op",
            "name": name,
            "pid": 1,
            "tid": thread,
            "ts": start,
            "dur": duration,
        }

    events = [
        {**STEP, "dur": 100},
        op("aten::linear", 0, 50),
        op("aten::t", 5, 5),
        op("aten::mm", 10, 40),
        op("aten::add", 60, 10),
        op("octavo::quantize_both", 70, 20),
        op("aten::mul", 75, 5),
        op("aten::silu", 60, 15, thread=2),
    ]
    summary = summarise(events)
    micro = {kind: round(1e6 * seconds, 3) for kind, seconds in summary.kinds.items()}
    assert micro == {GEMM: 50, OTHER: 25, CASTS: 20}
    assert summary.kernels["aten::linear"] == pytest.approx((5e-6, 1))
    assert summary.idle == pytest.approx(20e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::_scaled_mm", FLOAT8),
        ("aten::mm", GEMM),
        ("triton_tem_fused_mm_7", GEMM),
        ("Cijk_Ailk_Bljk_BBS_BH_MT128x128x32", GEMM),
        ("Float8Matmul", OTHER),
        ("Float8MatmulBackward", OTHER),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("c10d::_reduce_scatter_base_", COMMUNICATION),
        ("gloo:all_reduce", COMMUNICATION),
        ("_cast_wide_rows", CASTS),
        ("_column_maxima", CASTS),
        ("triton_poi_fused__to_copy_clamp_mul_3", CASTS),
        ("triton_poi_fused_add_mul_silu_3", OTHER),
        ("aten::add", OTHER),
        ("aten::_to_copy", OTHER),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
            OTHER,
        ),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_a_torn_trace_is_read_as_far_as_it_goes(tmp_path):
    whole = trace(CUDA).read()
    torn = tmp_path / "rank0_trace.json"
    torn.write_text(whole[: whole.index("cudnn_generated")])
    text = summarise_file(torn)
    assert "only its first part was read" in text
    assert "_cast_rows" in text


def test_a_long_trace_is_read_in_pieces_and_to_a_limit():
    many = [kernel("_cast_rows", 10 * n, 10) for n in range(30_000)]
    text = trace(many)
    assert summarise(events_of(text)).kinds[CASTS] == pytest.approx(0.3)  # over several pieces
    text.seek(0)
    part = summarise(events_of(text, largest=1 << 20))
    assert part.cut_off
    assert 0 < part.kinds[CASTS] < 0.3


def test_what_is_no_trace_is_told(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"loss": 1}')
    with pytest.raises(ValueError, match="no traceEvents"):
        summarise_file(path)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("missing.json", None, "No such file"),
        ("", None, "Is a directory"),
        ("x.json", b"hello", "has no traceEvents"),
        ("x.json", b"\xff\xfe\x00", "can't decode"),
        ("x.json", b'{"traceEvents": []}', "no operator and no kernel"),
        ("x.json", b'{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": "soon", "dur": 1}]}', "no operator"),
        ("x.json.gz", b"hello", "Not a gzipped file"),
        ("x.json.gz", gzip.compress(b'{"traceEvents": []}')[:-9], "ended before"),
    ],
    # Content in a name would differ between two workers' collections: gzip writes the time into it.
    ids=["missing", "folder", "text", "binary", "empty", "no time", "not gzip", "cut gzip"],
)
def test_what_is_no_trace_is_one_sentence(tmp_path, capsys, name, content, why):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    text = capsys.readouterr().err
    assert why in text
    assert text.startswith(f"{path}: not a readable Chrome trace")
    assert text.count("\n") == 1


def test_a_trace_is_printed(tmp_path, capsys):
    path = tmp_path / "x.json"
    trace(CUDA, path)
    assert main([str(path), str(path)]) == 0
    assert capsys.readouterr().out.count("Quantisation takes 10.0% of the step.") == 2
    assert main([]) == 2


def test_emulated_casts_are_not_told_as_none():
    text = page(
        summarise([{**STEP, "dur": 100}, {**STEP, "cat": "cpu_op", "name": "aten::mul", "dur": 50}]), "x"
    )
    assert re.search(r"^casts +n/a$", text, re.M)
    assert "The share of quantisation is unknown" in text
    assert "0.0% of the step" not in text


def test_every_step_is_recorded_once_and_without_torchs_warning(tmp_path, recwarn):
    a = torch.randn(64, 64)
    with profiling(Profiling(enable_profiling=True, profile_freq=1), tmp_path, 0) as end_of_step:
        for _ in range(3):
            (a @ a).relu()
            end_of_step()
    pages = sorted(tmp_path.rglob("rank0_summary.txt"))
    assert [path.parent.name for path in pages] == ["iteration_1", "iteration_2", "iteration_3"]
    assert all("[GEMM] aten::mm" in path.read_text() for path in pages)
    assert not [warning for warning in recwarn if "warmup" in str(warning.message)]


def test_compressed_traces_are_read(tmp_path):
    path = tmp_path / "x.json.gz"
    with gzip.open(path, "wt") as file:
        file.write(trace(CUDA).read())
    text = summarise_file(path)
    assert "x.json.gz: one step, 1.00 ms, by GPU kernels" in text
    assert "Quantisation takes 10.0% of the step." in text
    assert "[float8 GEMM] void cutlass::device_kernel<e4m3 gemm sm90_>" in text


def test_a_recorded_step_gets_its_page(tmp_path, monkeypatch):
    a = torch.randn(64, 64)
    with profiling(Profiling(enable_profiling=True, profile_freq=2), tmp_path, 0) as end_of_step:
        for _ in range(2):
            (a @ a).relu()
            end_of_step()
    (page,) = tmp_path.rglob("rank0_summary.txt")
    text = page.read_text()
    assert "rank0_trace.json: one step, " in text
    assert "[GEMM] aten::mm" in text
    assert "by operators on the CPU" in text

    def fails(path):
        raise ValueError("odd trace")

    warnings = []
    monkeypatch.setattr(profiling_module, "write_summary", fails)
    monkeypatch.setattr(profiling_module.logger, "warning", lambda text, *args: warnings.append(text % args))
    with profiling(Profiling(enable_profiling=True, profile_freq=2), tmp_path / "b", 0) as end_of_step:
        for _ in range(2):
            (a @ a).relu()
            end_of_step()
    assert len(warnings) == 1
    assert "odd trace" in warnings[0]
