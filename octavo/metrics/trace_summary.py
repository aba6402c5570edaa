"""Summarizes a profiled step's Chrome trace on one page: where the time went.

    python -m octavo.metrics.trace_summary outputs/profile_traces/iteration_10/rank0_trace.json

A trace with GPU kernels is counted by kernels: the time of a kind is the time during which at least one of
its kernels ran; exposed communication (not overlapped by computation) has a line of its own; idle is the time
during which no kernel ran. A CPU trace is counted by operators: each operator's self time, without the
operators that it calls, summed over threads; idle is the time during which no thread ran an operator.

Kinds are recognized by name, so a kernel can be misclassified: see `_KINDS`. Quantisation is the kind
`casts`: octavo's own kernels, and compiled kernels that take an absolute maximum or clamp to float8's range.
A CPU emulates float8: its GEMMs are ordinary ones, and its casts are ordinary operators, which count as
`other`; the page then shows n/a instead of 0%.

A trace can have gigabytes. It is read in pieces, up to `LARGEST` bytes; the page notes when it was cut off.
"""

import gzip
import heapq
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from octavo.core.fs import write_file
from octavo.core.terminal import for_terminal

LARGEST = 400_000_000
_PIECE = 1 << 20
_TOP = 12

FLOAT8, GEMM, CASTS, ATTENTION = "float8 GEMM", "GEMM", "casts", "attention"
COMMUNICATION, OTHER, IDLE = "communication", "other", "idle"

# The first pattern that a name matches decides; names are compared in lower case.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (COMMUNICATION, re.compile(r"nccl|rccl|gloo:|c10d::|^allreduce|allgather|reduce_?scatter|all_to_all")),
    (ATTENTION, re.compile(r"attention|flash|fmha|_sdpa|cudnn_generated_fort_native_sdpa|mha_")),
    (
        FLOAT8,
        re.compile(r"_scaled_mm|e4m3.*gemm|gemm.*e4m3|e4m3.*(cutlass|nvjet|sm90_)|nvjet_q|f8f8|fp8.*gemm"),
    ),
    (
        CASTS,
        re.compile(
            r"^_?cast_|^_?(column_maxima|magnitudes|maxima|transpose)\b|octavo\w*::.*(cast|quanti|transpose)"
            r"|triton_.*(abs.*max|clamp.*to_copy|to_copy.*clamp)"
        ),
    ),
    (
        OTHER,
        re.compile(r"^float8matmul"),
    ),  # our autograd function; the operators it calls are counted themselves
    (
        GEMM,
        re.compile(
            r"gemm|nvjet|cutlass|cublas|matmul|::mm$|::bmm$|::addmm$|::linear$|wgmma|sm\d\d_xmma"
            r"|triton_tem_fused\w*_(add)?b?mm|^cijk_"  # inductor's own GEMMs; AMD's
        ),
    ),
)


def kind_of(name: str) -> str:
    """The kind of a kernel or operator, by its name."""
    lower = name.lower()
    return next((kind for kind, pattern in _KINDS if pattern.search(lower)), OTHER)


@dataclass
class Summary:
    """Seconds of one profiled step. kinds: by kind; they may overlap on a GPU. exposed: communication that no
    computation overlaps. kernels: name -> (seconds, calls).
    """

    wall: float
    kinds: dict[str, float]
    idle: float
    kernels: dict[str, tuple[float, int]]
    on_gpu: bool
    exposed: float = 0.0
    cut_off: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def quantisation(self) -> float | None:
        """The share of the time spent on casts; None if they count as other operators."""
        if not self.on_gpu and CASTS not in self.kinds:
            return None
        return self.kinds.get(CASTS, 0.0) / self.wall if self.wall else 0.0


def events_of(file: IO[str], largest: int = LARGEST) -> Iterator[dict[str, Any] | None]:
    """Iterate over the events of a trace, reading it in pieces. A final None means that the trace was
    truncated or longer than `largest`.
    """
    decoder, text, read = json.JSONDecoder(), "", 0
    start = -1
    while start < 0:
        piece = file.read(_PIECE)
        if not piece:
            raise ValueError("it has no traceEvents")
        text, read = text + piece, read + len(piece)
        match = re.search(r'"traceEvents"\s*:\s*\[|^\s*\[', text)
        start = match.end() if match else -1
    text = text[start:]
    while True:
        at = 0
        while True:
            at = _past_separators(text, at)
            if at < len(text) and text[at] == "]":
                return
            try:
                event, at = decoder.raw_decode(text, at)
            except ValueError:
                break
            if isinstance(event, dict):
                yield event
        piece = file.read(_PIECE) if read < largest else ""
        if not piece:
            yield None
            return
        text, read = text[at:] + piece, read + len(piece)


def _past_separators(text: str, at: int) -> int:
    while at < len(text) and text[at] in ", \t\r\n":
        at += 1
    return at


@dataclass(frozen=True)
class _Event:
    name: str
    start: float
    end: float
    lane: Any


def summarise(events: Iterable[dict[str, Any] | None]) -> Summary:
    """Count the complete events of a trace (times in microseconds); `ValueError` if there are none."""
    kernels: list[_Event] = []
    operators: list[_Event] = []
    steps: list[tuple[float, float]] = []
    cut_off = False
    for event in events:
        if event is None:
            cut_off = True
            continue
        start, length = event.get("ts"), event.get("dur")
        if (
            event.get("ph") != "X"
            or not isinstance(start, int | float)
            or not isinstance(length, int | float)
        ):
            continue
        name, kind = str(event.get("name")), str(event.get("cat", "")).lower()
        timed = _Event(name, start, start + length, (event.get("pid"), event.get("tid")))
        if name.startswith("ProfilerStep"):
            if kind != "gpu_user_annotation":
                steps.append((timed.start, timed.end))
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append(timed)
        elif kind == "cpu_op":
            operators.append(timed)
    if not kernels and not operators:
        raise ValueError("it records no operator and no kernel")
    summary = _of_kernels(kernels, steps) if kernels else _of_operators(operators, steps)
    summary.cut_off = cut_off
    return summary


def _window(events: Sequence[_Event], steps: Sequence[tuple[float, float]]) -> float:
    """Seconds from the start of the step to the end of its last event."""
    spans = [(event.start, event.end) for event in events] + list(steps)
    if not spans:
        return 0.0
    return (max(end for _, end in spans) - min(start for start, _ in spans)) / 1e6


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds covered by at least one of `spans`."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6


def _of_kernels(kernels: Sequence[_Event], steps: Sequence[tuple[float, float]]) -> Summary:
    by_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
    by_name: dict[str, tuple[float, int]] = {}
    for kernel in kernels:
        by_kind[kind_of(kernel.name)].append((kernel.start, kernel.end))
        seconds, calls = by_name.get(kernel.name, (0.0, 0))
        by_name[kernel.name] = seconds + (kernel.end - kernel.start) / 1e6, calls + 1
    wall = _window(kernels, steps)
    busy = _covered((kernel.start, kernel.end) for kernel in kernels)
    computing = _covered(span for kind, spans in by_kind.items() if kind != COMMUNICATION for span in spans)
    kinds = {kind: _covered(spans) for kind, spans in by_kind.items()}
    return Summary(wall, kinds, max(0.0, wall - busy), by_name, on_gpu=True, exposed=busy - computing)


def _of_operators(operators: Sequence[_Event], steps: Sequence[tuple[float, float]]) -> Summary:
    kinds: dict[str, float] = defaultdict(float)
    by_name: dict[str, tuple[float, int]] = {}
    lanes: dict[Any, list[_Event]] = defaultdict(list)
    for operator in operators:
        lanes[operator.lane].append(operator)

    def count(operator: _Event, own: float, kind: str) -> None:
        kinds[kind] += own / 1e6
        seconds, calls = by_name.get(operator.name, (0.0, 0))
        by_name[operator.name] = seconds + own / 1e6, calls + 1

    for lane in lanes.values():
        open_: list[list[Any]] = []  # the enclosing operators: event, self time, kind
        for operator in sorted(lane, key=lambda o: (o.start, -o.end)):
            while open_ and open_[-1][0].end <= operator.start:
                count(*open_.pop())
            kind = kind_of(operator.name)
            if open_:
                open_[-1][1] -= operator.end - operator.start
                if kind == OTHER:  # operators called by a GEMM or attention count as part of it
                    kind = open_[-1][2]
            open_.append([operator, operator.end - operator.start, kind])
        while open_:
            count(*open_.pop())
    wall = _window(operators, steps)
    busy = _covered((operator.start, operator.end) for operator in operators)
    return Summary(wall, dict(kinds), max(0.0, wall - busy), by_name, on_gpu=False)


def page(summary: Summary, source: str) -> str:
    """The summary as a page of text."""
    wall = summary.wall or 1.0
    what = "GPU kernels" if summary.on_gpu else "operators on the CPU"
    lines = [f"{source}: one step, {summary.wall * 1e3:.2f} ms, by {what}", ""]
    if summary.cut_off:
        lines[1:1] = ["The trace is truncated or too long: only its first part was read.", ""]
    rows = [
        *(
            (kind, summary.kinds.get(kind, 0.0))
            for kind in (FLOAT8, GEMM, CASTS, ATTENTION, COMMUNICATION, OTHER)
        ),
        (IDLE, summary.idle),
    ]
    names = {GEMM: "bf16 GEMM" if summary.on_gpu else "GEMM (high precision, or emulated float8)"}
    for kind, seconds in rows:
        if kind == CASTS and summary.quantisation is None:
            lines.append(f"{kind:42} {'n/a':>13}")
            continue
        lines.append(f"{names.get(kind, kind):42} {seconds * 1e3:10.2f} ms {100 * seconds / wall:6.1f}%")
    if summary.on_gpu:
        lines.append(
            f"{'exposed communication':42} {summary.exposed * 1e3:10.2f} ms "
            f"{100 * summary.exposed / wall:6.1f}%"
        )
    lines += ["", _of_quantisation(summary), ""]
    lines.append(f"{'longest':>10} {'share':>7} {'calls':>7}  what")
    top = heapq.nlargest(_TOP, summary.kernels.items(), key=lambda item: item[1][0])
    for name, (seconds, calls) in top:
        shown = name if len(name) <= 90 else f"{name[:87]}..."
        lines.append(
            f"{seconds * 1e3:7.2f} ms {100 * seconds / wall:6.1f}% {calls:7}  [{kind_of(name)}] {shown}"
        )
    return "\n".join(lines) + "\n"


def _of_quantisation(summary: Summary) -> str:
    if summary.quantisation is None:
        return (
            "The share of quantisation is unknown: a CPU emulates float8 with ordinary operators, "
            f"which count as {OTHER!r}."
        )
    return f"Quantisation takes {100 * summary.quantisation:.1f}% of the step."


def summarise_file(path: Path) -> str:
    """The page of the trace at `path` (.json, or .json.gz); `ValueError` if it is not a trace."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return page(summarise(events_of(file)), path.name)


def write_summary(trace: Path) -> Path:
    """Write the page next to `trace`, as `…_summary.txt`; returns its path."""
    name = trace.name.removesuffix(".gz").removesuffix(".json").removesuffix("_trace")
    out = trace.with_name(f"{name}_summary.txt")
    write_file(out, summarise_file(trace))
    return out


def main(argv: Sequence[str]) -> int:
    """Print the page of each trace in `argv`; returns the exit code, 2 if a file is not a trace."""
    if not argv or argv[0].startswith("-"):
        print("usage: python -m octavo.metrics.trace_summary TRACE.json [TRACE.json.gz …]", file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    for argument in argv:
        try:
            print(for_terminal(summarise_file(Path(argument))))
        except (OSError, EOFError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            message = (
                f"{argument}: not a readable Chrome trace: {why}; name a …_trace.json that "
                "--profiling.enable_profiling wrote"
            )
            print(for_terminal(message), file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
