"""What the documentation says about the code is true: files, functions and rooms exist."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.docs.commands import ROOT
from tests.test_imports import FLOORS

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NEWS = ROOT / "CHANGELOG.md"  # it also names what is gone


def references(page: Path) -> Iterator[tuple[str, str]]:
    """(path, dotted name or "") of each path of the repository in backticks or a link of `page`."""
    folders = "octavo|tests|scripts|examples|benchmarks|docs|.github|.ci"
    path = rf"((?:{folders})/[\w./-]*[\w/])"
    text = page.read_text()
    yield from re.findall(rf"`{path}(?:::([\w.]+))?`", text)
    yield from ((target, "") for target in re.findall(rf"\]\({path}[)#]", text))


@cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes and methods (`Class.method`) that a file defines, and its constants."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return frozenset(found)


def wrong(page: Path) -> list[str]:
    found = set(references(page))
    gone = [path for path, _ in found if not (ROOT / path).exists()]
    undefined = [
        f"{path}::{name}"
        for path, name in found
        if name and path not in gone and name not in names_in(ROOT / path)
    ]
    return sorted(gone + undefined)


@pytest.mark.parametrize("page", [page for page in PAGES if page != NEWS], ids=lambda page: page.name)
def test_files_and_functions_that_a_page_names_exist(page):
    assert "\n".join(wrong(page)) == ""


def test_a_reference_to_nothing_is_found(tmp_path):
    (tmp_path / "page.md").write_text(
        "`octavo/gone.py`, `octavo/cli.py`, `octavo/cli.py::gone`, `octavo/cli.py::main`, [x](docs/gone.md#y)"
    )

    assert wrong(tmp_path / "page.md") == ["docs/gone.md", "octavo/cli.py::gone", "octavo/gone.py"]


def test_the_page_on_architecture_has_the_rooms_on_their_floors():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [(int(floor), room) for floor, room in re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.M)]

    assert sorted(rooms) == sorted((floor, room) for floor, row in enumerate(FLOORS) for room in row)
    assert f"{len(rooms)} *rooms*" in page


def test_the_api_page_has_every_public_name_of_the_library():
    import octavo.float8

    page = (ROOT / "docs" / "api.md").read_text()
    aliases = {"describe_path"}
    public = {name for name in octavo.float8.__all__ if not name.startswith("_")} - aliases

    assert sorted(public - set(re.findall(r"octavo\.float8\.(\w+)", page))) == []
