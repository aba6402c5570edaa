"""`octavo prepare`: tokenises text into a folder of token ids, which training reads directly.

    octavo prepare /data/books /data/web.parquet --tokenizer assets/hf/Llama-3.1-8B --out /data/mix
    octavo prepare --verify /data/mix

Memory is bounded by the longest documents. Rerun the same command to continue an interrupted run. The result
has the same bytes for any number of workers. Exit codes: 0; 2 for an error in the command, the text or the
folder; 130 for Ctrl-C.
"""

import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import octavo
from octavo.assets import CORPORA
from octavo.commands.argparser import Parser, bounded_float, bounded_int
from octavo.core.errors import ConfigError
from octavo.core.terminal import for_terminal
from octavo.data import shard_format
from octavo.data.corpus_files import TEXT_KEY, BadRecords, find_files, read_records
from octavo.data.file_formats import COMPRESSIONS, FORMATS, Record
from octavo.data.file_progress import FileProgress
from octavo.data.shard_format import Index, Vocabulary
from octavo.data.shard_writer import ShardWriter
from octavo.data.tokenizing import Batch, TokenizeJob, encode_batches
from octavo.launch.launcher import usable_cores
from octavo.tokenizer import Tokenizer, build_tokenizer

_BATCH_BYTES = 1 << 18
_BATCH_RECORDS = 1024
_BYTES_PER_WORKER = 4 << 20  # less text is not worth another process
_SHARD_TOKENS = 1 << 27


def _parser() -> Parser:
    parser = Parser(
        "octavo prepare",
        "Tokenise text into a folder that training.dataset can name. Sources are files, or folders of them:\n"
        f"{_formats()}.",
        "Rerun the same command to continue an interrupted run.",
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="a file, a folder, or a shipped corpus")
    parser.add_argument("--tokenizer", metavar="PATH", help="as in model.hf_assets_path")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--workers", type=bounded_int(1), metavar="N", help="processes (default: one per core)"
    )
    parser.add_argument(
        "--val_fraction",
        type=bounded_float(0, 0.5),
        default=0.0,
        metavar="SHARE",
        help="share of the documents that go to the validation split, not to training (default: 0)",
    )
    parser.add_argument(
        "--max_bad_records",
        type=bounded_int(0),
        default=0,
        metavar="N",
        help="skip and count up to N records without text (default: 0, the first is an error)",
    )
    parser.add_argument(
        "--text_key",
        default=TEXT_KEY,
        metavar="KEY",
        help=f"the text's key in JSON, its column in parquet (default: {TEXT_KEY})",
    )
    parser.add_argument(
        "--shard_tokens",
        type=bounded_int(1),
        default=_SHARD_TOKENS,
        metavar="N",
        help=f"close a shard when it has N tokens (default: {_SHARD_TOKENS:,})",
    )
    parser.add_argument(
        "--verify", type=Path, metavar="FOLDER", help="check all checksums of a prepared folder and exit"
    )
    return parser


def _formats() -> str:
    formats = ", ".join(f"{' and '.join(row.suffixes)} ({row.documents})" for row in FORMATS.values())
    return f"{formats}; {' and '.join(each.suffix for each in COMPRESSIONS)} of these"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo prepare`; returns the exit code. Raises `ConfigError` for a usage error."""
    parser = _parser()
    options = parser.read(sys.argv[1:] if argv is None else argv)
    if options.verify is not None:
        if options.sources or options.out:
            parser.error("--verify FOLDER cannot be combined with SOURCE or --out")
        print(for_terminal(verify(options.verify)))
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
        print("octavo prepare: interrupted; rerun the same command to continue", file=sys.stderr)
        return 130
    if summary:
        print(for_terminal(summary))
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
    """Tokenise `sources` into the new folder `out`; see the command's help for the arguments.

    Returns:
        The index, and a line about the bad records that were skipped (empty if there were none).

    Raises:
        ConfigError: naming the file, the record and the offset.
    """
    engine, bad = build_tokenizer(tokenizer), bad or BadRecords(0, "--max_bad_records")
    files = _files(sources)
    sizes = [file.stat().st_size for file in files]
    dtype = shard_format.narrowest_dtype(engine.vocab_size)
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
    workers = workers or max(1, min(usable_cores(), sum(sizes) // _BYTES_PER_WORKER))
    try:
        with FileProgress(sizes, workers) as progress:
            for result in encode_batches(
                _batches(files, key, position), job, workers=workers, tokenizer=engine
            ):
                for path, number, message in result.bad:
                    bad.add(path, number, message)
                for split, ids in result.splits.items():
                    writer.append(split, ids.data, ids.lengths, ids.text_bytes)
                for file, count in result.documents.items():
                    counts[file] += count
                writer.record_progress(result.last, _state(counts, bad))
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
        writer.close()
    return index, bad.summary()


def _state(counts: list[int], bad: BadRecords) -> dict[str, Any]:
    return {"documents": counts, "bad": [[*where, message] for where, message in bad.found.items()]}


def _files(sources: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        root = CORPORA.get(source) or Path(source).expanduser()
        if shard_format.is_prepared(root):
            raise ConfigError(f"{root}: is already a prepared folder")
        files += find_files(root)
    seen: set[Path] = set()
    for file in files:
        if (resolved := file.resolve()) in seen:
            raise ConfigError(f"{file}: is named twice among the sources")
        seen.add(resolved)
    return files


def _batches(files: Sequence[Path], key: str, position: tuple[int, Record] | None) -> Iterator[Batch]:
    """Yield the records of all files after `position`, in batches of about `_BATCH_BYTES`."""
    first, after = position or (0, None)
    records: list[tuple[int, Record]] = []
    size = 0
    for number in range(first, len(files)):
        for record in read_records(files[number], key, after=after if number == first else None):
            records.append((number, record))
            size += len(record.content or b"")
            if size >= _BATCH_BYTES or len(records) >= _BATCH_RECORDS:
                yield records
                records, size = [], 0
    if records:
        yield records


def _check_splits(writer: ShardWriter, out: Path, documents: int, validation_share: float) -> None:
    for split in [shard_format.TRAIN, *([shard_format.VALIDATION] if validation_share else [])]:
        if not writer.tokens(split):
            writer.discard()
            raise ConfigError(
                f"{out}: none of the {documents:,} documents is in the {split} split with "
                f"--val_fraction={validation_share:g}; give more documents or another share. To hold out "
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


def _describe(index: Index) -> str:
    return "; ".join(
        f"{split}: {index.documents(split):,} documents, {index.tokens(split):,} tokens in "
        f"{len(found)} shard{'s' if len(found) > 1 else ''}"
        for split, found in index.splits.items()
    )


def verify(folder: Path) -> str:
    """Check sizes, checksums and ids of a prepared folder against its index; returns a one-line summary.

    Raises:
        ConfigError: for the first error.
    """
    import numpy as np

    index = shard_format.read_index(folder)
    shard_format.check_sizes(folder, index)
    shard_format.check_checksums(folder, index.shards)
    for shard in index.shards:
        path = folder / shard.ids.name
        ids_N = np.memmap(path, dtype=np.dtype(index.dtype).newbyteorder("<"), mode="r")
        for start in range(0, len(ids_N), _SHARD_TOKENS >> 3):
            outside = np.flatnonzero(ids_N[start : start + (_SHARD_TOKENS >> 3)] >= index.vocabulary.size)
            if len(outside):
                token = start + int(outside[0])
                raise ConfigError(
                    f"{path}, token {token:,}: the id {int(ids_N[token])} is outside the vocabulary of "
                    f"{index.vocabulary.size:,}; prepare the data again"
                )
    return f"{folder}: valid; {_describe(index)}; tokenizer {index.vocabulary.source}"
