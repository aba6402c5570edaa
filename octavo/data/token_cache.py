"""An on-disk cache of tokenised local text; tokenising the shipped corpus takes seconds.

An entry in ~/.cache/octavo/tokens (or below XDG_CACHE_HOME) is named by a hash of everything that determines
the ids: the contents of the files, and the tokenizer. So entries never become stale, and all processes and
runs can share them. An entry is written under a temporary name and renamed; it is a zip archive with
checksums. A damaged entry is ignored and the text is tokenised again. The cache is limited to `_LIMIT` bytes;
the least recently used entries are removed first.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from octavo.core.cache_dir import cache_folder
from octavo.core.fs import replacing
from octavo.core.logging import logger
from octavo.data.corpus import Tokens, tokenize
from octavo.data.corpus_files import BadRecords, read_documents
from octavo.tokenizer import Tokenizer

_FORMAT = 2  # increase it when reading or tokenising the same text gives other ids than before
_LIMIT = 4 * 2**30


def load_or_tokenize(files: Sequence[Path], tokenizer: Tokenizer, bad: BadRecords | None) -> Tokens:
    """The ids of the documents in `files`, from the cache if possible.

    Text with bad records, or of which the tokenizer loses a part, is not cached: every run must report that.

    Raises:
        ConfigError: see `read_documents`.
    """
    path = _entry_path(files, tokenizer)
    cached = None if path is None else _load(path)
    if cached is not None:
        return cached
    tokens = tokenize((document for file in files for document in read_documents(file, bad)), tokenizer)
    complete = bad is None or not {file for file, _ in bad.found} & set(map(str, files))
    if (
        complete and not tokenizer.loses_text and path is not None and path == _entry_path(files, tokenizer)
    ):  # no file has changed since
        _save(path, tokens)
    return tokens


def _entry_path(files: Sequence[Path], tokenizer: Tokenizer) -> Path | None:
    """The cache entry for `files`; None if a file cannot be read or there is no home folder."""
    key = hashlib.sha256(f"{_FORMAT} {tokenizer.rules}".encode())
    try:
        for path in files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            key.update(os.fsencode(f"\n{content} {path.name}"))  # the suffix of the name is the format
        return cache_folder() / "tokens" / f"{key.hexdigest()}.npz"
    except (OSError, RuntimeError):
        return None


def _load(path: Path) -> Tokens | None:
    try:
        with path.open("rb") as file, np.load(file) as archive:
            tokens = Tokens(archive["ids_N"], int(archive["documents"]), int(archive["text_bytes"]))
    except Exception:  # missing, truncated, damaged: zip and numpy raise errors of a dozen types
        return None
    with suppress(OSError):
        os.utime(path)
    return tokens


def _save(path: Path, tokens: Tokens) -> None:
    if tokens.ids_N.nbytes > _LIMIT:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(
                file,
                ids_N=tokens.ids_N,
                documents=np.array(tokens.documents),
                text_bytes=np.array(tokens.text_bytes),
            )
    except OSError as error:
        logger.info("Tokens are not cached for the next run: %s: %s", path.parent, error.strerror or error)
    else:
        with suppress(OSError):  # another process may evict the same entry
            _evict(path.parent)


def _evict(folder: Path) -> None:
    """Remove the least recently used entries, and temporary files of killed processes, beyond `_LIMIT`."""
    entries = [(entry.stat(), entry) for entry in folder.iterdir()]
    room = _LIMIT
    for stat, entry in sorted(entries, key=lambda pair: pair[0].st_mtime, reverse=True):
        room -= stat.st_size
        if room < 0:
            entry.unlink(missing_ok=True)
