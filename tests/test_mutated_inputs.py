"""Whatever is in a file, reading it gives a value or a `ConfigError`: one message, never a traceback."""

import json
from contextlib import suppress
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.checkpoint import manifest
from octavo.checkpoint.manifest import FileDigest
from octavo.checkpoint.reader import read_state
from octavo.config import JobConfig, toml
from octavo.core.errors import ConfigError
from octavo.data import shard_format
from octavo.data.corpus_files import BadRecords, read_documents
from octavo.data.shard_format import File, Index, Shard, Vocabulary
from octavo.hf.model_sources import read_hf_config
from octavo.tokenizer import build_tokenizer
from tests.models.small_llama import SCALING, SPEC, small

_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": " |a+"}, "behavior": "Isolated", "invert": False},
    "post_processor": None,
    "decoder": {"type": "ByteFallback"},
    "model": {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "ab": 2, "<|end_of_text|>": 3},
        "merges": [["a", "b"]],
    },
}
_FILES = File("a.tokens", 8, "0" * 64), File("a.documents", 16, "1" * 64)
_INDEX = Index(
    "uint16", Vocabulary(4, "0" * 64, None, 3, "t"), {"train": (Shard(4, 1, *_FILES),)}, ({},), {}, 0
)
_STATE = {
    "step": 3,
    "tokens_seen": 9,
    "world_size": 1,
    "model_only": False,
    "data": {},
    "config": asdict(JobConfig()),
}
_MANIFEST = json.loads(
    manifest.render(3, sorted(manifest.ALGORITHMS)[0], {"a": FileDigest(3, ("0" * 64,))}, {"config": {}})
)
assert SPEC.hugging_face is not None
_CONFIG = SPEC.hugging_face.to_config(small(rope_scaling=SCALING))


def _manifest(folder):
    path = folder / manifest.FILE
    with suppress(
        ValueError, TypeError, AttributeError, RecursionError
    ):  # a right hash, to reach what is behind it
        fields = json.loads(path.read_bytes())
        fields.pop("sha256_of_the_above", None)
        path.write_bytes(manifest._serialize(fields))
    manifest.read(folder, 3)


READERS = {
    "job.toml": (
        "[training]\nsteps = 3\nseq_len = [1, 2]\n[model]\nflavor = 'x'\n",
        lambda at: toml.read(str(at / "job.toml")),
    ),
    "a.jsonl": (
        '{"text": "one"}\n{"text": "two"}\n',
        lambda at: list(read_documents(at / "a.jsonl", BadRecords(1))),
    ),
    "config.json": (_CONFIG, read_hf_config),
    "tokenizer.json": (_TOKENIZER, lambda at: build_tokenizer(str(at)).encode("ab a b")),
    manifest.FILE: (_MANIFEST, _manifest),
    "index.json": (json.loads(shard_format.to_json(_INDEX)), shard_format.read_index),
    "state.json": (_STATE, read_state),
}
VALUES = [
    None,
    True,
    -1,
    0,
    3,
    2**62,
    10**30,
    1e308,
    float("nan"),
    "",
    "\ud800",
    "x\0",
    "(",
    [],
    [[]],
    {},
    {"a": 1},
    ["a", 1],
]
PIECES = [
    b"",
    b"[",
    b"]",
    b"{",
    b'"',
    b"\\u",
    b"\xff",
    b"\0",
    b"\r",
    b"1e999",
    b"null",
    b"[" * 100_000,
    b"9" * 5000,
]


def _leaves(value, path=()):
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from _leaves(child, (*path, key))


def _replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def mutated(draw):
    """The name of a file, and bytes: a valid content with a few values or pieces of bytes replaced."""
    name = draw(st.sampled_from(sorted(READERS)))
    content = READERS[name][0]
    if not isinstance(content, str):
        for _ in range(draw(st.integers(0, 2))):
            path = draw(st.sampled_from(list(_leaves(content))))
            content = _replaced(content, path, draw(st.sampled_from(VALUES)))
        content = json.dumps(content)
    found = content.encode()
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(found)))
        end = start + draw(st.integers(0, 9))
        found = found[:start] + draw(st.sampled_from(PIECES)) + found[end:]
    return name, found


def check(folder, name, content):
    (folder / name).write_bytes(content)
    with suppress(ConfigError):
        READERS[name][1](folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mutated")


def test_the_files_are_valid_before(folder):
    for name, (content, read) in READERS.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        read(folder)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(mutated())
def test_a_mutated_file_is_read_or_refused(folder, mutation):
    check(folder, *mutation)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(mutated())
def test_many_mutated_files(folder, mutation):
    check(folder, *mutation)
