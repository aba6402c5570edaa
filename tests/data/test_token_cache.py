"""Cached tokens equal those of the text, with concurrent writers and damaged files."""

import os

import numpy as np
import pytest

from octavo.core.errors import ConfigError
from octavo.data import token_cache
from octavo.data.corpus import Tokens, tokenize
from octavo.data.corpus_files import BadRecords
from octavo.tokenizer import build_tokenizer
from tests.helpers import ranks


@pytest.fixture
def entries(tmp_path, monkeypatch):
    """A function that lists the entries of this test's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: sorted((tmp_path / "cache").rglob("*.*"))


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    paths[0].write_text("Who's there? Nay, answer me.")
    paths[1].write_text('{"text": "Long live the king!"}\n{"text": "Bernardo?"}\n')
    return paths


@pytest.fixture
def encoded(monkeypatch):
    """One item per call of `tokenize`."""
    calls = []
    monkeypatch.setattr(token_cache, "tokenize", lambda *args: calls.append(1) or tokenize(*args))
    return calls


def same(one, other):
    return one.ids_N.dtype == np.int32 and one[1:] == other[1:] and np.array_equal(one.ids_N, other.ids_N)


def test_the_second_run_reads_what_the_first_wrote(files, tokenizer, entries, encoded):
    texts = ["Who's there? Nay, answer me.", "Long live the king!", "Bernardo?"]
    expected = tokenize(texts, tokenizer)
    assert all(same(token_cache.load_or_tokenize(files, tokenizer, None), expected) for _ in range(2))
    assert expected.documents == 3
    assert (len(encoded), len(entries())) == (1, 1)


def test_another_text_order_format_or_tokenizer_is_another_entry(files, tokenizer, entries, tmp_path):
    def after(change):
        change()
        token_cache.load_or_tokenize(files, tokenizer, None)
        return len(entries())

    raw = tmp_path / "b.txt"
    assert after(lambda: None) == 1
    assert after(lambda: files[0].write_text("Who's here? Nay, answer me.")) == 2
    assert after(files.reverse) == 3
    assert after(lambda: files.__setitem__(0, files[0].rename(raw))) == 4  # JSON lines read as text

    other = build_tokenizer("octavo_bpe_2048")
    other._engine.model.dropout = 1.0  # no merges: the ids mean the same tokens, and text gives others
    assert other.fingerprint == tokenizer.fingerprint
    assert other.encode("king") != tokenizer.encode("king")
    token_cache.load_or_tokenize(files, other, None)
    assert len(entries()) == 5


def test_a_damaged_entry_is_replaced(files, tokenizer, entries, encoded):
    whole = token_cache.load_or_tokenize(files, tokenizer, None)
    (entry,) = entries()
    content = entry.read_bytes()
    cut = [content[:size] for size in range(0, len(content), 37)]
    at = content.index(whole.ids_N.tobytes())
    flipped = [
        content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        for place in [*range(at, at + whole.ids_N.nbytes), *range(len(content))[::5]]
    ]
    for damaged in [*cut, *flipped, b"", b"\x93NUMPY"]:
        entry.write_bytes(damaged)
        assert same(token_cache.load_or_tokenize(files, tokenizer, None), whole)
    assert len(encoded) > len(cut) + whole.ids_N.nbytes  # a flag or date of the archive may go unnoticed
    assert entries() == [entry]
    assert same(token_cache._load(entry), whole)


def test_bad_records_are_counted_in_each_run(files, tokenizer, entries):
    files[1].write_text('{"text": "Long live the king!"}\n{"text": 7}\n')
    for _ in range(2):
        bad = BadRecords(1)
        assert token_cache.load_or_tokenize(files, tokenizer, bad).documents == 2
        assert len(bad.found) == 1
    assert entries() == []
    with pytest.raises(ConfigError, match=r"b\.jsonl, line 2"):
        token_cache.load_or_tokenize(files, tokenizer, BadRecords(0))


def test_text_that_changes_while_it_is_read_is_not_cached(files, tokenizer, entries, monkeypatch):
    def slow(documents, tokenizer):
        files[0].write_text("Something else")
        return tokenize(documents, tokenizer)

    monkeypatch.setattr(token_cache, "tokenize", slow)
    token_cache.load_or_tokenize(files, tokenizer, None)
    assert entries() == []


@pytest.mark.parametrize("where", ["a file", "a full disk", "no home folder"])
def test_without_a_writable_cache_the_text_is_tokenised(
    where, files, tokenizer, entries, monkeypatch, tmp_path
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if where == "a file":
        (tmp_path / "cache").write_text("")
    elif where == "a full disk":
        monkeypatch.setattr(np, "savez", full)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert token_cache.load_or_tokenize(files, tokenizer, None).documents == 3
    assert entries() == []


def test_the_least_recently_used_entries_are_evicted(files, tokenizer, entries, monkeypatch):
    sizes = []
    for number in range(3):
        files[0].write_text(f"Act {number}")
        token_cache.load_or_tokenize(files, tokenizer, None)
        sizes.append(token_cache._entry_path(files, tokenizer))
        os.utime(sizes[-1], (number, number))
    files[0].write_text("Act 0")
    token_cache.load_or_tokenize(files, tokenizer, None)  # used
    monkeypatch.setattr(token_cache, "_LIMIT", 3 * sizes[0].stat().st_size + 20)
    files[0].write_text("Act 3")
    token_cache.load_or_tokenize(files, tokenizer, None)
    assert entries() == sorted([sizes[0], sizes[2], token_cache._entry_path(files, tokenizer)])

    monkeypatch.setattr(token_cache, "_LIMIT", 8)
    files[0].write_text("Act 4")
    token_cache.load_or_tokenize(files, tokenizer, None)  # larger than everything together may be
    assert len(entries()) == 3


def _read(files):
    tokens = token_cache.load_or_tokenize(files, build_tokenizer("octavo_bpe_2048"), None)
    return tokens.ids_N.tolist(), *tokens[1:]


def test_processes_at_the_same_time_agree(files, tokenizer, entries):
    files[0].write_text("To be, or not to be, that is the question. " * 2000)
    first, *others = ranks.fork([(_read, (files,)) for _ in range(4)])
    assert all(other == first for other in others)
    assert len(entries()) == 1
    assert same(token_cache._load(entries()[0]), Tokens(np.array(first[0], dtype=np.int32), *first[1:]))
