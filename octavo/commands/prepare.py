"""`octavo prepare`: text becomes a folder of token ids that training reads without tokenising.

    octavo prepare /data/books /data/web.parquet --tokenizer assets/hf/Llama-3.1-8B --out /data/mix
    octavo prepare --verify /data/mix

Memory stays bounded by the longest documents. An interrupted run is gone on with by the same command. The
result is the same bytes whatever the number of workers. Exit codes: 0; 2 for what is wrong with the command,
the text or the folder; 130 for Ctrl-C.
"""

import os
import platform
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import octavo
from octavo.assets import CORPORA
from octavo.commands.argparser import Parser, whole
from octavo.core.errors import ConfigError
from octavo.data import shard_format
from octavo.data.corpus_files import find_files
from octavo.data.file_progress import FileProgress
from octavo.data.records import TEXT_KEY, BadRecords, Record, read_records
from octavo.data.shard_format import Index, Vocabulary
from octavo.data.shard_writer import ShardWriter
from octavo.data.tokenizing import Batch, TokenizeJob, encode_all
from octavo.tokenizer import Tokenizer, build_tokenizer

_BATCH_BYTES = 1 << 18
_BATCH_RECORDS = 1024
_SMALL = 4 << 20  # bytes of text that are not worth another process
_SHARD_TOKENS = 1 << 27


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.5:
        raise ArgumentTypeError(f"expected a number from 0 to 0.5, got {text!r}")
    return value


def _parser() -> Parser:
    parser = Parser(
        "octavo prepare",
        "Tokenise text into a folder that training.dataset can name: .txt (a document a file), .jsonl and\n"
        ".json (one a line), .parquet (one a row), each perhaps .gz; files, or folders of them.",
        "An interrupted run is gone on with by the same command.",
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="a file, a folder, or a shipped corpus")
    parser.add_argument("--tokenizer", metavar="PATH", help="as in model.hf_assets_path")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument("--workers", type=whole(1), metavar="N", help="processes (default: one a core)")
    parser.add_argument(
        "--val_fraction",
        type=_fraction,
        default=0.0,
        metavar="SHARE",
        help="of the documents go to a validation split, which training.dataset does not read (default: 0)",
    )
    parser.add_argument(
        "--max_bad_records",
        type=whole(0),
        default=0,
        metavar="N",
        help="pass over and count up to N records that hold no text (default: 0, the first is an error)",
    )
    parser.add_argument(
        "--text_key", default=TEXT_KEY, metavar="KEY", help=f"of JSON and parquet (default: {TEXT_KEY})"
    )
    parser.add_argument(
        "--shard_tokens",
        type=whole(1),
        default=_SHARD_TOKENS,
        metavar="N",
        help=f"close a shard when it has this many (default: {_SHARD_TOKENS:,})",
    )
    parser.add_argument(
        "--verify", type=Path, metavar="FOLDER", help="compare all checksums of a prepared folder, and stop"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`octavo prepare`: the exit code. Raises `ConfigError` for a mistake in what was asked."""
    parser = _parser()
    options = parser.read(sys.argv[1:] if argv is None else argv)
    if options.verify is not None:
        if options.sources or options.out:
            parser.error("--verify FOLDER stands alone")
        print(verify(options.verify))
        return 0
    if not options.sources or options.tokenizer is None or options.out is None:
        parser.error("needs SOURCE…, --tokenizer and --out")
    try:
        index, summary = prepare(
            options.sources,
            tokenizer=options.tokenizer,
            out=options.out.expanduser(),
            workers=options.workers,
            validation_share=options.val_fraction,
            bad=BadRecords(options.max_bad_records, "--max_bad_records"),
            key=options.text_key,
            shard_tokens=options.shard_tokens,
        )
    except KeyboardInterrupt:
        print("octavo prepare: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    if summary:
        print(summary)
    print(f"Written: {options.out}: {_describe(index)}")
    print(f"To train on it: --training.dataset={options.out} --model.hf_assets_path={options.tokenizer}")
    return 0


def prepare(
    sources: Sequence[str],
    *,
    tokenizer: str,
    out: Path,
    workers: int | None = None,
    validation_share: float = 0.0,
    bad: BadRecords | None = None,
    key: str = TEXT_KEY,
    shard_tokens: int = _SHARD_TOKENS,
) -> tuple[Index, str]:
    """Tokenise `sources` into the new folder `out`; see the command's help.

    Returns:
        The index, and a line on the bad records that were passed over, empty where there were none.

    Raises:
        ConfigError: what is wrong, with which file, record and offset.
    """
    engine, bad = build_tokenizer(tokenizer), bad or BadRecords(0, "--max_bad_records")
    files = _files(sources)
    sizes = [file.stat().st_size for file in files]
    dtype = shard_format.dtype_for(engine.vocab_size)
    job = TokenizeJob(tokenizer, dtype, key, validation_share)
    identity = {
        "format": shard_format.FORMAT,
        "tokenizer": engine.fingerprint,
        "text_key": key,
        "val_fraction": validation_share,
        "shard_tokens": shard_tokens,
        "sources": [[str(file), size] for file, size in zip(files, sizes, strict=True)],
    }
    writer = ShardWriter(out, identity=identity, shard_tokens=shard_tokens)
    counts = [0] * len(files)  # documents of each file
    position: tuple[int, Record] | None = None
    if writer.position is not None:
        position = writer.position[0], Record(*writer.position[1])
        counts = writer.state["documents"]
        bad.found = {(path, number): message for path, number, message in writer.state["bad"]}
    workers = workers or max(1, min(_cores(), sum(sizes) // _SMALL))
    try:
        with FileProgress(sizes, workers) as progress:
            for result in encode_all(_batches(files, key, position), job, workers=workers, tokenizer=engine):
                for path, number, message in result.bad:
                    bad.add(path, number, message)
                for split, ids in result.splits.items():
                    writer.append(split, ids.data, ids.lengths)
                for file, count in result.documents.items():
                    counts[file] += count
                writer.mark(result.last, _state(counts, bad))
                file, record = result.last
                progress.show(file, record.offset, writer.tokens(shard_format.TRAIN), len(bad.found))
        _check_splits(writer, out, sum(counts), validation_share)
        index = writer.finish(
            None,
            None,
            dtype=dtype,
            vocabulary=_vocabulary(engine),
            sources=[
                {"path": str(file), "bytes": size, "documents": count}
                for file, size, count in zip(files, sizes, counts, strict=True)
            ],
            versions=_versions(),
            bad_records=len(bad.found),
        )
    finally:
        writer.abandon()
    return index, bad.summary()


def _state(counts: list[int], bad: BadRecords) -> dict[str, Any]:
    return {"documents": counts, "bad": [[*where, message] for where, message in bad.found.items()]}


def _files(sources: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        root = CORPORA.get(source) or Path(source).expanduser()
        if shard_format.is_prepared(root):
            raise ConfigError(f"{root}: is prepared already")
        files += find_files(root)
    resolved = [file.resolve() for file in files]
    for number, file in enumerate(resolved):
        if file in resolved[:number]:
            raise ConfigError(f"{files[number]}: named twice among the sources")
    return files


def _batches(files: Sequence[Path], key: str, position: tuple[int, Record] | None) -> Iterator[Batch]:
    """The records of all files behind `position`, in batches of about a quarter of a megabyte."""
    first, after = position or (0, None)
    records: list[tuple[int, Record]] = []
    size = 0
    for number in range(first, len(files)):
        for record in read_records(files[number], key, after=after if number == first else None):
            records.append((number, record))
            size += len(record.content or b"")
            if size >= _BATCH_BYTES or len(records) >= _BATCH_RECORDS:
                yield Batch(tuple(records))
                records, size = [], 0
    if records:
        yield Batch(tuple(records))


def _check_splits(writer: ShardWriter, out: Path, documents: int, validation_share: float) -> None:
    wanted = [shard_format.TRAIN, *([shard_format.VALIDATION] if validation_share else [])]
    for split in wanted:
        if not writer.tokens(split):
            writer.discard()
            raise ConfigError(
                f"{out}: none of the {documents:,} documents fell into the {split} split, with "
                f"--val_fraction={validation_share:g}; give more documents, or another share. To hold out "
                "parts of documents instead, leave it 0 and train with validation.fraction"
            )


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(
        size=tokenizer.vocab_size,
        sha256=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        source=tokenizer.source,
    )


def _versions() -> dict[str, str]:
    import tokenizers

    return {
        "octavo": octavo.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
    }


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _describe(index: Index) -> str:
    return "; ".join(
        f"{split}: {index.documents(split):,} documents, {index.tokens(split):,} tokens in "
        f"{len(found)} shard{'s' if len(found) > 1 else ''}"
        for split, found in index.splits.items()
    )


def verify(folder: Path) -> str:
    """Compare sizes, checksums and ids of a prepared folder with its index; returns a line that says what is
    in it.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    import numpy as np

    index = shard_format.read_index(folder)
    shard_format.check_sizes(folder, index)
    shard_format.check_sums(folder, index.shards)
    for shard in index.shards:
        path = folder / shard.ids.name
        ids_N = np.memmap(path, dtype=np.dtype(index.dtype).newbyteorder("<"), mode="r")
        for start in range(0, len(ids_N), _SHARD_TOKENS >> 3):
            outside = np.flatnonzero(ids_N[start : start + (_SHARD_TOKENS >> 3)] >= index.vocabulary.size)
            if len(outside):
                token = start + int(outside[0])
                raise ConfigError(
                    f"{path}, token {token:,}: the id {int(ids_N[token])} lies outside the vocabulary of "
                    f"{index.vocabulary.size:,}; prepare the data again"
                )
    return f"{folder}: in order; {_describe(index)}; tokenizer {index.vocabulary.source}"
