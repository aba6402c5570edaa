"""Documents come out of files unchanged, and a damaged file is named with the record and the remedy."""

import gzip
import json
import logging
import os
import re

import pytest

from octavo.core.errors import ConfigError
from octavo.data.corpus_files import BadRecords, find_files, parse, read_documents, read_records

DOCUMENTS = ["Who's there?\r\n\tNay, answer me.\n", "naïve 漢字 🙂", "x", "line one\nline two"]


def json_lines(keys="text"):
    return "".join(json.dumps({keys: document}) + "\n" for document in DOCUMENTS).encode()


def write(folder, name, content):
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.txt.gz"])
def test_a_text_file_is_one_document(tmp_path, name):
    path = tmp_path / name
    content = DOCUMENTS[0].encode() + DOCUMENTS[1].encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_documents(path)) == [DOCUMENTS[0] + DOCUMENTS[1]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_lines_hold_one_document_a_line(tmp_path, name):
    path = write(tmp_path, name, json_lines() + b"\n  \n" + b'{"text": "no line end", "url": 1}')
    assert list(read_documents(path)) == [*DOCUMENTS, "no line end"]


def test_parquet_holds_one_document_a_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"n": [1, 2, 3, 4, 5], "text": [*DOCUMENTS, "y"]}), tmp_path / "a.parquet"
    )
    assert list(read_documents(tmp_path / "a.parquet")) == [*DOCUMENTS, "y"]
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet, row 1: 'text' is null"):
        list(read_documents(tmp_path / "b.parquet"))
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(ConfigError, match=r"c\.parquet: no column 'text' \(columns: body\)"):
        list(read_documents(tmp_path / "c.parquet"))
    torn = (tmp_path / "a.parquet").read_bytes()[:-10]
    (tmp_path / "d.parquet").write_bytes(torn)
    with pytest.raises(ConfigError, match=r"d\.parquet: not a readable parquet file"):
        list(read_documents(tmp_path / "d.parquet"))


BAD: list[tuple[str, bytes, str]] = [
    ("a.txt", b"caf\xe9 au lait", r"a\.txt: byte 3 \(0xe9\) is not UTF-8; .*iconv"),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "\xff"}\n',
        r"line 2 \(offset 14\): byte 10 \(0xff\) is not UTF-8",
    ),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b',
        r"line 2 \(offset 14\): not a JSON .*last line.*truncated",
    ),
    (
        "a.jsonl",
        b'{"text": "a"\n{"text": "b"}\n',
        r"a\.jsonl, line 1 \(offset 0\): not a JSON object on one line \((?!.*truncated)",
    ),
    (
        "a.jsonl.gz",
        b'{"body": "a", "id": 1}\n',
        r"gz, line 1 \(offset 0\): no key 'text' \(keys: body, id\)",
    ),
    ("a.jsonl", b'"a"\n', r"line 1 \(offset 0\): a str, not an object"),
    ("a.jsonl", b'{"text": 5}\n', r"line 1 \(offset 0\): 'text' is a int, not a string"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": ""}\n', r"line 3 \(offset 15\): the document is empty"),
    ("a.txt", b"", r"a\.txt: the document is empty"),
    ("a.jsonl", b'{"text": "\\ud83d"}\n', r"line 1 \(offset 0\): 'text' contains half a surrogate pair"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_names_file_and_record_of_what_is_wrong(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ConfigError, match=message):
        list(read_documents(path))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-12], id="truncated"),
        pytest.param(lambda content: b"plain text", id="not compressed"),
        pytest.param(
            lambda content: content[:40] + bytes([content[40] ^ 255]) + content[41:], id="a byte changed"
        ),
    ],
)
def test_names_a_damaged_compressed_file(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(json_lines() * 50)))
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz: the compressed data is truncated or damaged"):
        list(read_documents(path))


def test_finds_files_in_order_of_path(tmp_path):
    for name in [
        "b/2.txt",
        "b/1.jsonl",
        "a.txt",
        "c.parquet",
        "b/.hidden.txt",
        ".git/x.txt",
        "notes.md",
        "b-1/z.txt",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "up").symlink_to(tmp_path)  # a link to a parent folder
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path)]
    assert found == ["a.txt", "b-1/z.txt", "b/1.jsonl", "b/2.txt", "c.parquet"]
    assert find_files(tmp_path / "a.txt") == [tmp_path / "a.txt"]


def test_says_what_is_there_instead(tmp_path):
    with pytest.raises(ConfigError, match="found no files"):
        find_files(tmp_path)
    for name in ["a.md", "b.md", "c.csv"]:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"no file of a supported format.*found 2 x \.md, 1 x \.csv"):
        find_files(tmp_path)
    with pytest.raises(ConfigError, match=r"c\.csv: not a supported format"):
        find_files(tmp_path / "c.csv")
    with pytest.raises(ConfigError, match=r"gone: no such file or folder"):
        find_files(tmp_path / "gone")


@pytest.fixture
def zstd(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")

    def write(name, content):
        with pyarrow.output_stream(str(tmp_path / name), compression="zstd") as file:
            file.write(content)
        return tmp_path / name

    return write


def test_zstd_files_are_read_and_resumed(zstd):
    path = zstd("a.jsonl.zst", json_lines())
    records = list(read_records(path))
    assert [parse(record) for record in records] == DOCUMENTS
    assert list(read_records(path, after=records[1])) == records[2:]
    assert list(read_documents(zstd("b.txt.zst", b"one"))) == ["one"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ConfigError, match=r"a\.jsonl\.zst: cannot be read \(Truncated"):
        list(read_documents(path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    content = b"Who's there?" if name == "a.txt" else json_lines()
    path = write(tmp_path, name, b"\xef\xbb\xbf" + content)
    assert list(read_documents(path)) == (["Who's there?"] if name == "a.txt" else DOCUMENTS)
    if name == "a.jsonl":
        records = list(read_records(path))
        assert list(read_records(path, after=records[0])) == records[1:]
        assert path.read_bytes()[records[0].offset :].startswith(records[0].content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("naïve".encode("utf-16"), r"holds UTF-16 text; convert it, `iconv -f utf-16 -t utf-8 {name} > NEW`"),
        ("naïve".encode("utf-16-be"), "text with zero bytes"),
        (gzip.compress(b"naive", mtime=0), r"holds compressed data; rename it to {name}\.gz"),
        (b"\x28\xb5\x2f\xfd\x00", r"rename it to {name}\.zst"),
    ],
    ids=["utf-16", "utf-16-be", "gzip", "zstd"],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_is_no_utf8_text_is_an_error_and_no_bad_record(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ConfigError, match=message.format(name=re.escape(name))):
        list(read_documents(path, BadRecords(limit=10)))


def test_links_within_a_folder_count_once_and_dead_ones_are_errors(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    corpus.mkdir()
    elsewhere.mkdir()
    (corpus / "b.txt").write_text("b")
    (elsewhere / "c.txt").write_text("c")
    (corpus / "a.txt").symlink_to(corpus / "b.txt")
    (corpus / "c.txt").symlink_to(elsewhere / "c.txt")
    (corpus / "d.txt").symlink_to(elsewhere / "c.txt")
    assert [path.name for path in find_files(corpus)] == ["b.txt", "c.txt"]
    (corpus / "e.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"e\.txt: links to .*gone, which does not exist"):
        find_files(corpus)
    with pytest.raises(ConfigError, match=r"e\.txt: links to"):
        find_files(corpus / "e.txt")


def test_pipes_are_errors_where_they_would_be_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for root in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ConfigError, match=r"a\.txt: not a regular file"):
            find_files(root)


def test_files_of_other_formats_are_reported(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("octavo"), "propagate", True)
    for name in ("a.jsonl", "b.bz2", "c.bz2", "d.arrow"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.INFO, "octavo"):
        find_files(tmp_path)
    assert caplog.messages == [f"{tmp_path}: files of other formats are not read: 2 x .bz2, 1 x .arrow"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"caf\xe9" * 99), ("a.jsonl", b'[{"text": "x"}]\n[]\n')]
)
def test_a_whole_file_is_never_skipped(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"not UTF-8|none of its records is a document; the first: .*line 1"
    ):
        list(read_documents(tmp_path / name, BadRecords(limit=9)))
