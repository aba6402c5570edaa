"""The documentation builds as a site without a warning, and its pages request nothing from another server."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def build(folder: Path, addition: str = "") -> subprocess.CompletedProcess[str]:
    """Build the site in `folder`, with `addition` at the end of the last page."""
    shutil.copytree(DOCS, folder / "docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    (folder / "octavo").symlink_to(ROOT / "octavo")
    with (folder / "docs" / "faq.md").open("a") as page:
        page.write(f"\n{addition}\n")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT)


def pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


def test_the_site_builds_without_a_warning(tmp_path):
    built = build(tmp_path)

    assert built.returncode == 0, built.stderr
    pages = {page.parent.name: page.read_text() for page in (tmp_path / "site").rglob("index.html")}
    assert {"site", "quickstart", "tutorial", "float8", "api", "architecture", "faq"} <= set(pages)
    assert "convert_to_float8_training" in pages["api"]
    for page in pages.values():  # what a browser fetches by itself
        fetched = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', page)
        assert fetched
        assert not [url for pair in fetched for url in pair if url.startswith(("http", "//"))]


@pytest.mark.parametrize(
    "addition",
    ["[a page](nowhere.md)", "[a heading](quickstart.md#nowhere)", "::: octavo.float8.nowhere"],
    ids=["page", "heading", "name"],
)
def test_a_reference_to_nothing_is_an_error(addition, tmp_path):
    built = build(tmp_path, addition)

    assert built.returncode != 0
    assert "nowhere" in re.sub(r"\x1b\[[0-9;]*m", "", built.stdout + built.stderr)  # without colours


def test_every_page_is_in_the_navigation():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]

    assert sorted(pages_of(nav)) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_picture_exists():
    pictures = [
        page.parent / source
        for page in (ROOT / "README.md", *DOCS.rglob("*.md"))
        for pair in re.findall(r'!\[[^]]*\]\(([^)]+)\)|<img[^>]* src="([^"]+)"', page.read_text())
        for source in pair
        if source
    ]

    assert pictures
    assert [picture for picture in pictures if not picture.is_file()] == []
