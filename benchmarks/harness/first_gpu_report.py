"""What a run of first_gpu.py found: one table, and the pages of the documentation that show it. No torch."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.goals import COPY_SHARE, OVER_BF16, OVER_TORCHAO, PEAK_OVER_BF16

PAGES = ("docs/hardware.md", "docs/performance.md")
UNMEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """One line of the table. met: whether `measured` reaches `goal` or, without one, comes within 10 % of
    `predicted`; None: unknown. hint: what to look at next if it does not.
    """

    what: str
    goal: str
    predicted: str
    measured: str
    met: bool | None
    hint: str

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        return self.what, self.goal, self.predicted, self.measured, "" if self.met else self.hint


HEAD = ("", "goal", "predicted", "measured", "look next at")


def rows(out: Path) -> list[Row]:
    """The whole table of the results in `out`. A figure that was not measured refers to its part's log."""
    found: list[Row] = []
    for part, make in (
        ("selfcheck", _selfcheck),
        ("layer_stack", _layer_stack),
        ("kernel_tests", _kernel_tests),
        ("full_model", _full_model),
        ("gemm", _gemm),
        ("cast_bandwidth", _casts),
    ):
        result = _result(out, part)
        for row in make(result):
            missing = row.measured == UNMEASURED
            found.append(
                Row(row.what, row.goal, row.predicted, row.measured, None, f"logs/{part}.log")
                if missing
                else row
            )
    return found


def _result(out: Path, part: str) -> Any:
    """The parsed JSON or XML of a part, or None."""
    xml = out / "results" / f"{part}.xml"
    try:
        if xml.exists():
            return ET.parse(xml).getroot()
        files = [*(out / "results").glob(f"{part}-*.json"), *(out / "results").glob(f"{part}.json")]
        return json.loads(files[-1].read_text()) if files else None
    except (ET.ParseError, json.JSONDecodeError):  # ended while it wrote
        return None


def _sides(result: Any) -> dict[str, Any]:
    comparisons = result["comparisons"] if result else []
    return comparisons[0]["sides"] if comparisons else {}


def _over(predicted_ms: float | None, ms: float | None) -> float | None:
    return predicted_ms / ms if predicted_ms and ms else None


def _figure(value: float | None, form: str = "{:.2f}x", missing: str = "n/a") -> str:
    return missing if value is None else form.format(value)


def _selfcheck(result: Any) -> Iterator[Row]:
    checks = result["checks"] if result else []
    wrong = [f"{c['recipe']} {c['gemm']} ({c['backend']})" for c in checks if not c["passed"]]
    measured = f"{len(checks) - len(wrong)} of {len(checks)} right" if checks else UNMEASURED
    yield Row("products and casts of all recipes", "all right", "n/a", measured, not wrong, ", ".join(wrong))


def _layer_stack(result: Any) -> Iterator[Row]:
    sides = _sides(result)
    bf16 = sides.get("bf16", {})

    def row(what: str, ours: str, theirs: str, goal: float, hint: str) -> Row:
        a, b = sides.get(ours), sides.get(theirs)
        if not a or not b:
            return Row(what, f"{goal}x (H100)", "n/a", UNMEASURED, None, hint)
        predicted = _over(b["predicted_ms"], a["predicted_ms"])
        measured = b["ms"]["median"] / a["ms"]["median"]
        return Row(what, f"{goal}x (H100)", _figure(predicted), f"{measured:.2f}x", measured >= goal, hint)

    for name, goal in OVER_BF16.items():
        yield row(f"{name} over bf16", name, "bf16", goal, "shares of a copy below; a profile of one layer")
    for recipe, goal in OVER_TORCHAO.items():
        ours, theirs = f"{recipe} fused", f"torchao {recipe}"
        yield row(f"{ours} over torchao's", ours, theirs, goal, "the same side over bf16")
    for name in OVER_BF16:
        side = sides.get(name)
        known = side and side["peak_gb"] and bf16["peak_gb"]
        share = side["peak_gb"] / bf16["peak_gb"] if side and known else None
        met = None if share is None else share <= PEAK_OVER_BF16
        measured = _figure(share, missing=UNMEASURED)
        goal_text = f"<= {PEAK_OVER_BF16:.2f}x"
        yield Row(f"{name}: peak memory over bf16's", goal_text, "n/a", measured, met, "saved GB, by layer")
    control = result["comparisons"][0]["control"] if sides else None
    spread = f"{control['least']:.3f} to {control['most']:.3f}" if control else UNMEASURED
    steady = control is not None and 0.98 <= control["least"] <= control["most"] <= 1.02
    yield Row("control (bf16 against itself)", "0.98 to 1.02", "1", spread, steady, "clocks in the JSON")
    attention = result["summary"].get("attention", UNMEASURED) if result else UNMEASURED
    first = attention == "CUDNN_ATTENTION"
    yield Row("attention kernel", "CUDNN_ATTENTION", "n/a", attention, first, "why cuDNN refuses the shapes")


def _kernel_tests(result: Any) -> Iterator[Row]:
    what = "tests on the GPU"
    suites = list(result.iter("testsuite")) if result is not None else []
    if not suites:
        yield Row(what, "all pass", "n/a", UNMEASURED, None, "")
        return
    tests, skipped, wrong = (
        sum(int(suite.get(key, 0)) for suite in suites for key in keys)
        for keys in (("tests",), ("skipped",), ("failures", "errors"))
    )
    measured = f"{tests - skipped - wrong} passed, {wrong} failed, {skipped} skipped"
    yield Row(what, "all pass", "n/a", measured, wrong == 0 and tests > skipped, "logs/kernel_tests.log")


def _full_model(result: Any) -> Iterator[Row]:
    failed = [value for name, value in (result["summary"] if result else {}).items() if "not run" in name]
    side = next(iter(_sides(result).values()), None)
    fits = "yes" if side else failed[0] if failed else UNMEASURED
    predicted = side and side["predicted_peak_gb"]
    hint = "memory by part: `octavo estimate`"
    yield Row("Llama3-8B whole trains", "yes", "n/a", fits, side is not None, hint)
    peak = _figure(side and side["peak_gb"], "{:.1f} GB", UNMEASURED)
    met = side["peak_gb"] <= 1.1 * predicted if side and predicted else None
    yield Row("  peak memory", "n/a", _figure(predicted, "{:.1f} GB"), peak, met, hint)
    speed = _figure(side and side["tokens_per_second"], "{:,.0f}", UNMEASURED)
    seconds = side["predicted_ms"] / 1e3 if side and side["predicted_ms"] else None
    tokens = result["settings"].get("training.seq_len") if result else None
    expected = _figure(tokens / seconds if tokens and seconds else None, "{:,.0f}")
    ratio = side and side["measured_over_predicted"]
    met = ratio <= 1.1 if ratio else None
    yield Row("  tokens/s", "n/a", expected, speed, met, "the layer's figures above; optimizer and loss")


def _gemm(result: Any) -> Iterator[Row]:
    comparison = result["comparisons"][0] if result and result["comparisons"] else None
    what = f"largest product, {comparison['title']}" if comparison else "largest product"
    sides = comparison["sides"] if comparison else {}
    for name in ("bf16", "rowwise", "rowwise fast", "tensorwise fast"):
        side = sides.get(name)
        ratio = side and side["measured_over_predicted"]
        expected = side["tflops"] * ratio if side and ratio else None
        measured = _figure(side and side["tflops"], "{:.4g} TFLOP/s", UNMEASURED)
        met = ratio <= 1.1 if ratio else None
        expected_text = _figure(expected, "{:.0f} TFLOP/s")
        yield Row(f"{what}: {name}", "n/a", expected_text, measured, met, "clock and power in the JSON")


def _casts(result: Any) -> Iterator[Row]:
    shares: dict[str, list[float]] = {}
    for comparison in result["comparisons"] if result else []:
        if "octavo" in comparison["sides"]:
            job = comparison["title"].partition(" [")[0]
            shares.setdefault(job, []).append(comparison["sides"]["octavo"]["share"])
    goal = f">= {COPY_SHARE}"
    if not shares:
        yield Row("cast kernels, share of a copy's speed", goal, "n/a", UNMEASURED, None, "")
    for job, values in shares.items():
        least = min(values)
        hint = "registers and loads of this kernel (ncu)"
        yield Row(f"cast {job}: share of a copy", goal, "n/a", f"{least:.2f}", least >= COPY_SHARE, hint)


def text_table(table: Sequence[Row]) -> str:
    """Aligned columns."""
    lines = [HEAD, *(row.cells for row in table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    text = [head, ["---"] * len(head), *lines]
    return "\n".join(
        "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in text
    )


def publish(archive: Path, root: Path) -> Path:
    """Copy the results in `archive` to `root`/benchmarks/results/DEVICE-DATE and fill the pages' regions.

    Returns that folder. Raises ValueError for what is no run on a GPU, and for a page without a region.
    """
    with tempfile.TemporaryDirectory(prefix="octavo-first-gpu-") as temporary:
        out = Path(temporary)
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(out, filter="data")
            whole = json.loads((out / "parts.json").read_text())
        except (OSError, tarfile.TarError, json.JSONDecodeError) as error:
            raise ValueError(f"{archive} is no archive of first_gpu: {error}") from None
        if whole["smoke"]:
            raise ValueError(f"{archive} is of a --smoke run, which measures nothing")
        machine = _machine(out)
        if machine is None or machine["kind"] != "cuda":
            raise ValueError(f"{archive} has no result from a GPU; its logs say why")
        filled = {page: _fill(root / page, _region(page, out, whole, machine)) for page in PAGES}
        device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
        folder = root / "benchmarks" / "results" / f"{device}-{re.sub('[^0-9T]', '', whole['date'])[:15]}"
        shutil.copytree(out / "results", folder, dirs_exist_ok=True)
        shutil.copy(out / "parts.json", folder)
        shutil.copy(out / "table.txt", folder)
    for page, text in filled.items():
        (root / page).write_text(text)
    return folder


def _machine(out: Path) -> dict[str, Any] | None:
    for part in ("selfcheck", "layer_stack", "full_model", "gemm", "cast_bandwidth"):
        if result := _result(out, part):
            return result["machine"]
    return None


def _region(page: str, out: Path, whole: dict[str, Any], machine: dict[str, Any]) -> str:
    ran_on = (
        f"{machine['device']}, {whole['date'][:10]}, commit {machine['commit']}, torch {machine['torch']}, "
        f"CUDA {machine['cuda']}, triton {machine['triton']}, "
        f"torchao {machine['torchao'] or 'not installed'}:"
    )
    if page == "docs/performance.md":
        table = _markdown(HEAD, [row.cells for row in rows(out)])
    else:
        parts = [(part["name"], part["settles"], part["ended"]) for part in whole["parts"]]
        table = _markdown(("part", "settles", "ended"), parts)
    return f"{ran_on}\n\n{table}"


def _fill(page: Path, text: str) -> str:
    """The page with `text` between its markers."""
    begin, end = "<!-- first_gpu: begin -->", "<!-- first_gpu: end -->"
    before, opened, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"{page} has no region: add the lines {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"
