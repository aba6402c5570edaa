"""The documentation builds as a site without a warning, and its pages ask no foreign server for anything."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=LIMIT)


def test_the_site_builds_without_a_warning(tmp_path):
    built = build(ROOT, tmp_path / "site")

    assert built.returncode == 0, built.stderr
    pages = {page.parent.name: page.read_text() for page in (tmp_path / "site").rglob("index.html")}
    assert {"site", "quickstart", "tutorial", "float8", "api", "faq"} <= set(pages)
    assert "convert_to_float8_training" in pages["api"]
    for page in pages.values():  # what a browser fetches by itself
        fetched = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', page)
        assert not [url for pair in fetched for url in pair if url.startswith(("http", "//"))]


def test_a_dead_link_is_an_error(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "octavo").symlink_to(ROOT / "octavo")
    with (tmp_path / "docs" / "faq.md").open("a") as page:
        page.write("\n[nothing](nowhere.md)\n")

    built = build(tmp_path, tmp_path / "site")

    assert built.returncode != 0
    assert "nowhere.md" in built.stderr
