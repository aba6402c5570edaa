"""Tokens of local text, kept from one run to the next: to tokenise the shipped corpus takes seconds.

An entry under ~/.cache/octavo/tokens (or XDG_CACHE_HOME) is named by a hash of all that decides the ids: the
content of the files, and the tokenizer. So nothing there is ever out of date, and any processes and runs may
share it. An entry appears whole, by a rename, and is a zip archive with checksums: whatever is wrong with it,
the text is tokenised as if it were not there. Together they take `_LIMIT` bytes at most; those that were not
used for the longest time go first.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from octavo.core.cache_dir import cache_folder
from octavo.core.logging import logger
from octavo.data.corpus import Tokens, encode
from octavo.data.records import BadRecords, read_documents
from octavo.tokenizer import Tokenizer

_FORMAT = 1  # raise it when a file gives other documents, or a document other ids, than before
_LIMIT = 4 * 2**30


def tokens_of(files: Sequence[Path], tokenizer: Tokenizer, bad: BadRecords | None) -> Tokens:
    """The documents of `files` as ids; those with bad records, which each run counts, are not kept.

    Raises:
        ConfigError: see `read_documents`.
    """
    path = _path(files, tokenizer)
    kept = None if path is None else _load(path)
    if kept is not None:
        return kept
    tokens = encode((document for file in files for document in read_documents(file, bad)), tokenizer)
    whole = bad is None or not {file for file, _ in bad.found} & set(map(str, files))
    if whole and path is not None and path == _path(files, tokenizer):  # nobody has written to them meanwhile
        _keep(path, tokens)
    return tokens


def _path(files: Sequence[Path], tokenizer: Tokenizer) -> Path | None:
    """The entry of what `files` give; None where one cannot be read, of which reading it tells, and where
    there is no home folder.
    """
    key = hashlib.sha256(f"{_FORMAT} {tokenizer.rules}".encode())
    try:
        for path in files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            key.update(os.fsencode(f"\n{content} {path.name}"))  # the end of its name is its format
        return cache_folder() / "tokens" / f"{key.hexdigest()}.npz"
    except (OSError, RuntimeError):
        return None


def _load(path: Path) -> Tokens | None:
    try:
        with path.open("rb") as file, np.load(file) as kept:
            tokens = Tokens(kept["ids_N"], int(kept["documents"]))
    except Exception:  # not there, cut short, damaged: zip and numpy raise errors of a dozen types
        return None
    with suppress(OSError):
        os.utime(path)
    return tokens


def _keep(path: Path, tokens: Tokens) -> None:
    if tokens.ids_N.nbytes > _LIMIT:
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(file, ids_N=tokens.ids_N, documents=np.array(tokens.documents))
        os.replace(temporary, path)
    except OSError as error:
        logger.info("Tokens are not kept for the next run: %s: %s", path.parent, error.strerror or error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    else:
        with suppress(OSError):  # another process makes room as well
            _make_room(path.parent)


def _make_room(folder: Path) -> None:
    """Remove what was not used for the longest time, and what writers left that were killed."""
    entries = [(entry.stat(), entry) for entry in folder.iterdir()]
    left = _LIMIT
    for stat, entry in sorted(entries, key=lambda one: one[0].st_mtime, reverse=True):
        left -= stat.st_size
        if left < 0:
            entry.unlink(missing_ok=True)
