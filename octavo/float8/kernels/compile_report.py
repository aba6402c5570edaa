"""Compiles every kernel for a GPU ahead of time, without a GPU, and reports the resources it needs.

    python -m octavo.float8.kernels.compile_report

Each configuration of each kernel is compiled for an architecture. The report lists registers per thread,
shared memory and spills of the machine code, and whether its PTX uses the hardware's conversion to float8.
Spills are registers that did not fit and live in memory: memory-bound kernels cannot afford them.

    --arch 90      Hopper (default); 100 is Blackwell
    --all          every number format and dtype, not only bfloat16 to the format that recipes use
    --defaults     only the first configuration of each kernel, which runs where nothing is tuned
    --json         one JSON object per line
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from octavo.float8.kernels import (
    adamw_cast,
    add_rms_norm,
    cast_given_maxima,
    cast_given_scale,
    cast_lines,
    cast_rows_columns,
    cast_tensor,
    cast_tiles,
    kernel_maxima,
    silu_mul,
)
from octavo.float8.kernels.kernel_launch import SCALE_FORMATS, Config
from octavo.float8.kernels.numerics import INTERPRETING

ARCHITECTURES = (89, 90, 100, 103, 120)
"""Compute capabilities, times ten, with the hardware's conversion to float8."""
BOTH = {"ROWS": True, "COLUMNS": True}
ROWS_ONLY, COLUMNS_ONLY = {"ROWS": True, "COLUMNS": False}, {"ROWS": False, "COLUMNS": True}
FORMATS = [("e4m3", "fp32"), ("e4m3", "pow2"), ("e5m2", "fp32")]
ONE_BYTE_FORMATS = [("e4m3", "e8m0"), ("e4m3", "e8m0_floor")]


@dataclass(frozen=True)
class CompileJob:
    """A kernel to compile: its configurations, its other constants, and its formats, of which the first is
    the one that recipes use.
    """

    kernel: Any
    configs: tuple[Config, ...]
    constants: dict[str, Any]
    formats: list[tuple[str, str]]
    converts: bool = True
    dtypes: dict[str, str] = field(default_factory=dict)
    """Element types of pointers other than the default."""


def jobs() -> Iterator[CompileJob]:
    tensor, rows, tiles, lines = cast_tensor, cast_rows_columns, cast_tiles, cast_lines
    pow2_first = [FORMATS[1], FORMATS[0], FORMATS[2]]
    yield CompileJob(tensor._magnitudes, tensor.CONFIGS_MAGNITUDES, {}, FORMATS[:1], converts=False)
    for which in (BOTH, ROWS_ONLY, COLUMNS_ONLY):
        constants = {**which, "PROGRAMS": cast_tensor.MAX_PROGRAMS}
        yield CompileJob(tensor._cast_tensor, tensor.CONFIGS_CAST, constants, FORMATS)
        yield CompileJob(tiles._cast_tiles, tiles.CONFIGS, {**which, "SIDE": 128}, FORMATS)
        yield CompileJob(lines._cast_lines, lines.CONFIGS, {**which, "GROUP": 128}, FORMATS)
        yield CompileJob(lines._cast_lines, lines.CONFIGS, {**which, "GROUP": 32}, ONE_BYTE_FORMATS)
    for width, columns in ((4096, True), (16384, True), (4096, False)):
        constants = {"COLUMNS": columns, "STRIP": 32, "BLOCK_K": width}
        yield CompileJob(rows._cast_rows, rows.CONFIGS_ROWS, constants, pow2_first)
    wide = {"COLUMNS": True, "STRIP": 8}
    yield CompileJob(rows._cast_wide_rows, rows.CONFIGS_WIDE_ROWS, wide, pow2_first)
    yield CompileJob(rows._column_maxima, rows.CONFIGS_MAXIMA, {"STRIP": 64}, FORMATS[:1], converts=False)
    yield CompileJob(rows._cast_columns, rows.CONFIGS_COLUMNS, {}, pow2_first)
    yield CompileJob(cast_given_maxima._cast_given_maxima, cast_given_maxima.CONFIGS, {}, pow2_first)
    given = {"TILE_M": cast_given_scale.TILE_M, "TILE_K": cast_given_scale.TILE_K}
    for which in (BOTH, ROWS_ONLY, COLUMNS_ONLY):
        yield CompileJob(
            cast_given_scale._cast_given_scale, cast_given_scale.CONFIGS, {**which, **given}, FORMATS
        )
    tile = {"TILE_M": kernel_maxima.TILE_M, "TILE_K": kernel_maxima.TILE_K}
    yield CompileJob(silu_mul._forward, silu_mul.CONFIGS, tile, FORMATS[:1], converts=False)
    yield CompileJob(silu_mul._backward, silu_mul.CONFIGS, tile, FORMATS[:1], converts=False)
    for width in (4096, 8192):
        row = {"STRIP": add_rms_norm.STRIP, "BLOCK_K": width}
        for residual in (True, False):
            constants = {**row, "RESIDUAL": residual}
            yield CompileJob(
                add_rms_norm._forward, add_rms_norm.CONFIGS_FORWARD, constants, FORMATS[:1], converts=False
            )
        yield CompileJob(
            add_rms_norm._backward, add_rms_norm.CONFIGS_BACKWARD, row, FORMATS[:1], converts=False
        )
    adamw = {"SOURCE": 1, "TILE_M": adamw_cast.TILE_M}
    tile = {**adamw, "TILE_K": adamw_cast.TILE_K}
    weight = dict.fromkeys(("w", "g", "m", "v"), "fp32")
    configs = adamw_cast.CONFIGS
    yield CompileJob(adamw_cast._adamw_maxima, configs, tile, FORMATS[:1], False, weight)
    yield CompileJob(adamw_cast._adamw_squares, configs, {**adamw, "SIDE": 128}, FORMATS, True, weight)


@dataclass(frozen=True)
class Compiled:
    """One row of the report. `spilled` is bytes per thread, `shared` bytes per block."""

    kernel: str
    constants: str
    config: str
    default: bool
    input: str
    float8: str
    scales: str
    arch: int
    registers: int
    shared: int
    spilled: int
    converts: bool
    """Whether the kernel writes float8."""
    native: bool
    """Whether the hardware's saturating conversion is in its PTX."""
    key: str
    """Hash of all that the row depends on, including the compiler's version: equal keys, equal rows."""


def _signature(
    job: CompileJob, constants: dict[str, Any], dtype: str, scales: str
) -> tuple[dict[str, str], dict]:
    one_byte = SCALE_FORMATS[scales] >= 2
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("x", "a", "b", "h", "da", "db", "dh", "dx")}
    pointers |= {f"{name}_ptr": f"*{dtype}" for name in ("residual", "w", "y", "dy")}
    pointers |= {"rms_ptr": "*fp32", "dw_ptr": "*fp32", "saturated_ptr": "*i32"}
    pointers |= dict.fromkeys(("decay", "beta1", "beta2", "rate", "root", "eps"), "fp32")
    pointers |= {f"{name}_ptr": "*i32" for name in ("maxima", "amax", "amax_t", "rows", "columns")}
    pointers |= {f"{of}_{name}_ptr": "*i32" for of in ("da", "db") for name in ("rows", "columns")}
    pointers |= {"data_ptr": "*u8", "data_t_ptr": "*u8"}
    pointers |= dict.fromkeys(("scale_ptr", "scale_t_ptr"), "*u8" if one_byte else "*fp32")
    pointers |= {f"{name}_ptr": f"*{of}" for name, of in job.dtypes.items()}
    signature, attributes = {}, {}
    for position, name in enumerate(job.kernel.fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointers.get(name, "i32")
        if signature[name] != "fp32":
            # Sizes are multiples of 16 in any model that hardware takes, and allocations aligned.
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, attributes


@cache
def _source(kernel: JITFunction) -> str:
    """The source of a kernel and of all functions that it calls, and the constants that they use."""
    functions, constants = {kernel}, {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop().fn
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, JITFunction) and value not in functions:
                functions.add(value)
                waiting.append(value)
            elif isinstance(value, tl.constexpr):
                constants[name] = value.value
    texts = sorted(inspect.getsource(function.fn) for function in functions)
    return "\n".join([*texts, str(sorted(constants.items()))])


@dataclass(frozen=True)
class Unit:
    """One compilation: a kernel with one configuration, input dtype and float8 format."""

    job: CompileJob
    config: Config
    dtype: str
    float8: str
    scales: str
    arch: int

    def _constants(self) -> dict[str, Any]:
        numbers = {"MANTISSA": 3 if self.float8 == "e4m3" else 2, "SCALES": SCALE_FORMATS[self.scales]}
        tile = {name: value for name, value in self.config.items() if not name.startswith("num_")}
        every = {**numbers, **self.job.constants, **tile}
        return {name: value for name, value in every.items() if name in self.job.kernel.fn.arg_names}

    @property
    def default(self) -> bool:
        return self.config == self.job.configs[0]

    @property
    def key(self) -> str:
        given = (
            triton.__version__,
            _source(self.job.kernel.fn),
            self._constants(),
            _signature(self.job, self._constants(), self.dtype, self.scales),
            self.config,
            self.default,
            self.job.converts,
            self.arch,
        )
        return hashlib.sha256(repr(given).encode()).hexdigest()[:16]

    def compile(self) -> Compiled:
        """Compile for sm_`arch` and read the result."""
        job, constants = self.job, self._constants()
        signature, attributes = _signature(job, constants, self.dtype, self.scales)
        source = ASTSource(job.kernel.fn, signature, constants, attributes)
        options = {name: self.config[name] for name in ("num_warps", "num_stages")}
        compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        registers, spilled = _usage(compiled.asm["cubin"])
        return Compiled(
            kernel=f"{Path(job.kernel.fn.__globals__['__file__']).stem}.{job.kernel.fn.__name__}",
            constants=" ".join(f"{k}={v}" for k, v in job.constants.items()),
            config=" ".join(f"{k}={v}" for k, v in self.config.items()),
            default=self.default,
            input=self.dtype,
            float8=self.float8,
            scales=self.scales,
            arch=self.arch,
            registers=registers,
            shared=compiled.metadata.shared,
            spilled=spilled,
            converts=job.converts,
            native=f"cvt.rn.satfinite.{self.float8}x2.f32" in compiled.asm["ptx"],
            key=self.key,
        )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread. Without calls, a kernel uses its stack for spills only."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def units(arch: int, *, everything: bool = False, only_defaults: bool = False) -> Iterator[Unit]:
    """All compilations: of every or only the default configuration, in every or only the first format."""
    for job in jobs():
        for float8, scales in job.formats if everything else job.formats[:1]:
            for dtype in ("bf16", "fp16", "fp32") if everything else ("bf16",):
                for config in job.configs[:1] if only_defaults else job.configs:
                    yield Unit(job, config, dtype, float8, scales, arch)


def main(argv: list[str] | None = None) -> int:
    """Print the report; exit code 1 if a default configuration spills or lacks the native conversion."""
    parser = argparse.ArgumentParser(
        prog="python -m octavo.float8.kernels.compile_report",
        description="Resources that each compiled kernel needs.",
    )
    parser.add_argument(
        "--arch", type=int, default=90, choices=ARCHITECTURES, help="90 is Hopper (default), 100 Blackwell"
    )
    parser.add_argument("--all", action="store_true", help="every number format and dtype")
    parser.add_argument("--defaults", action="store_true", help="only each kernel's first configuration")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args(argv)
    if INTERPRETING:
        parser.error("TRITON_INTERPRET=1 compiles nothing: unset it")
    bad = 0
    for unit in units(options.arch, everything=options.all, only_defaults=options.defaults):
        row = unit.compile()
        wrong = row.default and (row.spilled > 0 or row.converts != row.native)
        bad += wrong
        if options.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        notes = ["default"] if row.default else []
        if row.converts != row.native:
            notes.append("no native conversion")
        print(
            f"sm_{row.arch} {row.kernel} {row.constants} {row.input}->{row.float8}/{row.scales} "
            f"[{row.config}]: {row.registers} registers, {row.shared} B shared, {row.spilled} B spilled"
            f"{''.join(f', {note}' for note in notes)}{'  <-- wrong' if wrong else ''}",
            flush=True,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
