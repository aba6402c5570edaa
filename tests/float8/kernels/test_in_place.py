"""Autotuning runs a kernel many times: whatever a kernel reads and overwrites must be restored between runs.

Read from the sources, so that it holds for kernels yet to be written, and needs neither triton nor a GPU.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[3] / "octavo/float8/kernels"


@dataclass
class Kernel:
    """A Triton function: the parameters it reads and writes through, and the calls that hand them on."""

    parameters: list[str]
    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)
    calls: list[tuple[str, list[set[str]]]] = field(default_factory=list)
    tuned: bool = False
    updates: tuple[str, ...] = ()


def kernels_of(*sources: str) -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for source in sources:
        tree = ast.parse(source)
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.unparse(d) for d in node.decorator_list
            ):
                found[node.name] = _read(node, constants)
    changed = True
    while changed:  # what a called function does to its parameters, its callers do to theirs
        changed = False
        for kernel in found.values():
            for name, arguments in kernel.calls:
                if name not in found:
                    continue
                for parameter, given in zip(found[name].parameters, arguments, strict=False):
                    for mine, theirs in (
                        (kernel.reads, found[name].reads),
                        (kernel.writes, found[name].writes),
                    ):
                        if parameter in theirs and not given <= mine:
                            mine |= given
                            changed = True
    return found


def _read(node: ast.FunctionDef, constants: dict[str, ast.expr]) -> Kernel:
    kernel = Kernel([argument.arg for argument in node.args.args])
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "tuned":
            kernel.tuned = True
            for keyword in decorator.keywords:
                if keyword.arg == "updates":
                    value = keyword.value
                    named = constants[value.id] if isinstance(value, ast.Name) else value
                    kernel.updates = ast.literal_eval(named)
    for call in (each for each in ast.walk(node) if isinstance(each, ast.Call)):
        arguments = [_pointers(argument, kernel.parameters) for argument in call.args]
        name = ast.unparse(call.func)
        if name == "tl.load" or name.startswith("tl.atomic"):
            kernel.reads |= arguments[0]
        if name == "tl.store" or name.startswith("tl.atomic"):
            kernel.writes |= arguments[0]
        kernel.calls.append((name, arguments))
    return kernel


def _pointers(expression: ast.expr, parameters: list[str]) -> set[str]:
    names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
    return {name for name in names if name in parameters and name.endswith("_ptr")}


FOUND = kernels_of(*(file.read_text() for file in sorted(KERNELS.glob("*.py"))))


@pytest.mark.parametrize("name", [name for name, kernel in FOUND.items() if kernel.tuned])
def test_tuning_restores_what_a_kernel_updates_in_place(name: str) -> None:
    kernel = FOUND[name]

    assert set(kernel.updates) == kernel.reads & kernel.writes


def test_the_reading_finds_loads_stores_and_what_functions_do_for_a_kernel() -> None:
    source = """
@triton.jit
def _step(a_ptr, b_ptr, i):
    tl.store(a_ptr + i, tl.load(b_ptr + i))

@tuned(CONFIGS, key=["N"], updates=("x_ptr",))
@triton.jit
def kernel(x_ptr, y_ptr, z_ptr, N):
    _step(x_ptr, x_ptr, N)
    tl.store(y_ptr, tl.load(z_ptr))
"""
    kernel = kernels_of(source)["kernel"]

    assert (kernel.tuned, kernel.updates) == (True, ("x_ptr",))
    assert kernel.reads == {"x_ptr", "z_ptr"}
    assert kernel.writes == {"x_ptr", "y_ptr"}
    assert sum(kernel.tuned for kernel in FOUND.values()) > 12
    assert FOUND["_adamw_maxima"].reads >= {"w_ptr", "m_ptr", "v_ptr", "g_ptr"}
