"""Which room may import which: to lower floors only. `python -m tests.test_imports` prints rooms and arrows.

Also what is free of torch, and that no file name and no class name of the package occurs twice.
"""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "octavo"
FILES = sorted(PACKAGE.rglob("*.py"))

STANDARD = sys.stdlib_module_names

# The rooms of the package, from the ground up. A file imports its own room and lower floors; rooms on the
# same floor do not import each other. docs/architecture.md says what each is for.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("core", "float8", "roofline", "assets"),
    ("tokenizer", "utils", "families"),
    ("data",),
    ("config",),
    ("preflight",),
    ("distributed", "metrics", "launch"),
    ("optim", "checkpoint"),
    ("models",),
    ("hf",),
    ("train",),
    ("commands",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_ARROWS = 75

# Rooms that stand alone, beside what FLOORS says.
ALONE = {
    "octavo.float8": ("octavo.float8",),
    "octavo.float8.kernels": ("octavo.float8.kernels",),
    "octavo.utils": (),  # an import path of the library's tutorial
    "octavo.core": ("octavo.core",),
    "octavo.roofline": ("octavo.roofline",),
    "octavo.assets": ("octavo.assets",),
}
# The only files that know the library; all others reach it through octavo.train.quantization. A config
# takes the names of the recipes from it.
KNOW_FLOAT8 = ("octavo.float8", "octavo.train.quantization", "octavo.commands.tune", "octavo.config.names")

# What the library may import from elsewhere.
LIBRARY_NEEDS = {"torch"}
KERNELS_NEED = {"torch", "triton"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imported(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Every module that `source` imports, at any depth of the code, with relative imports resolved.

    `from a import b` gives a.b, since the text does not show whether b is a module.
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


def room_of(module: str) -> str | None:
    """The room of a module; None for `octavo` itself, which only has the version."""
    part = module.split(".")[1] if "." in module else ""
    return part if part in FLOOR_OF else None


def breaches(module: str, imports: set[str]) -> list[str]:
    """The imports that `module` must not have."""
    room = room_of(module)
    alone = ALONE.get(max((p for p in ALONE if is_under(module, p)), key=len, default=""))
    knows_float8 = any(is_under(module, prefix) for prefix in KNOW_FLOAT8)
    found = []
    for name in sorted(name for name in imports if is_under(name, "octavo")):
        other = room_of(name)
        if other is None:
            continue
        if alone is not None:
            forbidden = not any(is_under(name, prefix) for prefix in alone)
        else:
            upward = room is None or (other != room and FLOOR_OF[other] >= FLOOR_OF[room])
            forbidden = upward or (other == "float8" and not knows_float8)
        if forbidden:
            found.append(name)
    return found


def arrows() -> Counter[tuple[str, str]]:
    """(room, room that it imports) -> the number of imports."""
    found: Counter[tuple[str, str]] = Counter()
    for module, file in MODULES.items():
        room = room_of(module)
        for name in imports_of(file):
            other = room_of(name) if is_under(name, "octavo") else None
            if room and other and other != room:
                found[room, other] += 1
    return found


def test_every_file_is_in_a_room():
    assert [module for module in MODULES if module != "octavo" and room_of(module) is None] == []


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_lead_to_lower_floors(file):
    assert breaches(module_name(file), imports_of(file)) == []


def test_there_are_few_arrows_between_rooms():
    found = arrows()

    assert len(found) <= MOST_ARROWS
    assert found["train", "checkpoint"] > 0


@pytest.mark.parametrize(
    ("module", "source", "breach"),
    [
        ("octavo.float8.linear", "from octavo import config", "octavo.config"),
        ("octavo.float8.linear", "from ..metrics import logger", "octavo.metrics.logger"),
        ("octavo.float8.kernels.cast", "from ..recipe import Cast", "octavo.float8.recipe.Cast"),
        ("octavo.train.trainer", "def f():\n    import octavo.float8", "octavo.float8"),
        ("octavo.train.trainer", "from octavo import float8", "octavo.float8"),
        ("octavo.optim.optimizer", "from octavo.float8.linear import x", "octavo.float8.linear.x"),
        ("octavo.data.build", "from octavo.train import trainer", "octavo.train.trainer"),
        ("octavo.metrics.logger", "from octavo.launch.status import x", "octavo.launch.status.x"),
        ("octavo.core.files", "import octavo.config", "octavo.config"),
        ("octavo", "import octavo.config", "octavo.config"),
    ],
)
def test_a_breach_is_found(module, source, breach):
    assert breaches(module, set(imported(source, module))) == [breach]


def test_no_two_files_have_one_name():
    stems = Counter(file.stem for file in FILES if file.stem not in ("__init__", "__main__", "main"))

    assert [stem for stem, count in stems.items() if count > 1] == []


def test_no_two_classes_have_one_name():
    found = defaultdict(list)
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module)

    assert len(found) > 100
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


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
    "octavo.launch.launcher",
    *(
        module_name(file)
        for file in FILES
        if room_of(module_name(file)) in ("core", "config", "preflight", "roofline")
        and module_name(file) != "octavo.roofline.timing"
    ),
)


def test_what_judges_a_command_imports_neither_torch_nor_numpy():
    program = (
        f"import importlib, sys\nfor name in {TORCH_FREE!r}: importlib.import_module(name)\n"
        "print([name for name in ('torch', 'numpy', 'tokenizers') if name in sys.modules])"
    )
    assert in_a_process_of_its_own(program) == "[]\n"


def test_a_whole_check_of_a_job_imports_neither_torch_nor_numpy():
    program = (
        "import sys\nfrom octavo.launch.launcher import plan\n"
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


if __name__ == "__main__":
    for (room, other), count in sorted(arrows().items()):
        print(f"{room:>12} -> {other:<12} {count:3}")
    print(f"{len(FLOOR_OF)} rooms, {len(arrows())} arrows")
