"""The direction of imports: trainer -> octavo.float8 -> octavo.float8.kernels; and what is free of torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.config import names
from tests.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "octavo"
FILES = sorted(PACKAGE.rglob("*.py"))

STANDARD = sys.stdlib_module_names

# What each part may import of octavo, by the longest matching prefix; None: everything but octavo.float8.
MAY_IMPORT: dict[str, tuple[str, ...] | None] = {
    "octavo.float8.kernels": ("octavo.float8.kernels",),
    "octavo.float8": ("octavo.float8",),
    "octavo.utils": ("octavo.float8",),  # an import path of the library's tutorial
    "octavo.quantization": ("octavo",),
    "octavo.tune": ("octavo",),  # it times what quantization.py would choose
    "octavo.tuning": ("octavo",),
    "octavo.roofline": ("octavo.roofline",),
    "octavo.config": ("octavo.config", "octavo.data.files", "octavo.data.spec", "octavo.data.shards"),
    "octavo": None,
}

# What the library may import from elsewhere.
LIBRARY_NEEDS = {"torch"}
KERNELS_NEED = {"torch", "triton"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Every module that `source` imports, at any depth of the code, with relative imports resolved.

    `from a import b` gives a.b: whether b is a module cannot be told from the text, and a.b is under a.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: None if is_package else -1]
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(file: Path) -> set[str]:
    return set(imported(file.read_text(), module_name(file), is_package=file.name == "__init__.py"))


def is_under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def breaches(module: str, imports: set[str]) -> list[str]:
    """Which of these imports the law forbids to `module`."""
    part = max((prefix for prefix in MAY_IMPORT if is_under(module, prefix)), key=len)
    allowed = MAY_IMPORT[part]
    own = {name for name in imports if is_under(name, "octavo")}
    if allowed is None:
        return sorted(name for name in own if is_under(name, "octavo.float8"))
    free = {"octavo.__version__"}
    return sorted(name for name in own - free if not any(is_under(name, prefix) for prefix in allowed))


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_one_way(file):
    assert breaches(module_name(file), imports_of(file)) == []


@pytest.mark.parametrize(
    ("module", "source", "breach"),
    [
        ("octavo.float8.linear", "from octavo import config", "octavo.config"),
        ("octavo.float8.linear", "from ..components import metrics", "octavo.components.metrics"),
        ("octavo.float8.kernels.cast", "from ..recipe import Cast", "octavo.float8.recipe.Cast"),
        ("octavo.train", "def f():\n    import octavo.float8", "octavo.float8"),
        ("octavo.train", "from octavo import float8", "octavo.float8"),
        ("octavo.components.optimizer", "from octavo.float8.linear import x", "octavo.float8.linear.x"),
    ],
)
def test_a_breach_is_found(module, source, breach):
    assert breaches(module, set(imported(source, module))) == [breach]


@pytest.mark.parametrize(
    "file", [f for f in FILES if is_under(module_name(f), "octavo.float8")], ids=module_name
)
def test_the_library_needs_torch_alone(file):
    needs = KERNELS_NEED if is_under(module_name(file), "octavo.float8.kernels") else LIBRARY_NEEDS
    elsewhere = {name.partition(".")[0] for name in imports_of(file)} - STANDARD - {"octavo"}

    assert elsewhere <= needs


def in_a_process_of_its_own(program: str) -> str:
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


TORCH_FREE = (
    "octavo",
    "octavo.assets",
    "octavo.cli",
    "octavo.launch",
    *(
        module_name(file)
        for file in FILES
        if is_under(module_name(file), "octavo.config") or is_under(module_name(file), "octavo.roofline")
    ),
)


def test_what_judges_a_command_imports_neither_torch_nor_numpy():
    program = (
        f"import importlib, sys\nfor name in {TORCH_FREE!r}: importlib.import_module(name)\n"
        "print([name for name in ('torch', 'numpy', 'tyro', 'tokenizers') if name in sys.modules])"
    )
    assert in_a_process_of_its_own(program) == "[]\n"


def test_a_whole_check_of_a_job_imports_neither_torch_nor_numpy():
    program = (
        "import sys\nfrom octavo.launch import plan\n"
        "plan(['--model.converters=float8', '--training.steps=300'], {}, gpus=0, cores=2)\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    assert in_a_process_of_its_own(program) == "[]\n"


def test_the_library_loads_nothing_of_the_trainer():
    program = (
        "import sys, octavo.float8\n"
        "own = {name for name in sys.modules if name.startswith('octavo')}\n"
        "print(sorted(name for name in own if name != 'octavo' and not name.startswith('octavo.float8')))"
    )
    assert in_a_process_of_its_own(program) == "[]\n"


def test_the_names_of_recipes_in_config_are_the_librarys():
    from octavo.float8.recipe import RECIPES

    assert set(names.RECIPES) == set(RECIPES)
