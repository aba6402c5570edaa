"""What the trainer costs over a bare loop: tokens/s of both, same model, same batches, one process, on a CPU.

    python benchmarks/loop_overhead.py [--steps 60] [--json FILE]

Both sides train the debug model in float32 with fused AdamW, clipping and a loss read back on every step;
the trainer also logs, writes metrics, collects garbage and asks for checkpoints and profiles as it always
does. The sides take single steps in turn, and the one that goes first changes each time, so that both meet
the same state of the machine. The result is the median over all pairs of the bare step's time over the
trainer's.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.nn.functional as F
from torch import nn

from octavo import config, models
from octavo.components.init import init_weights
from octavo.components.tokenizer import build_tokenizer
from octavo.data.build import build_dataloader
from octavo.distributed import mesh
from octavo.models.llama3.model import Llama
from octavo.train import Trainer

BATCH, LENGTH = 8, 256


def bare_steps() -> Iterator[float]:
    """Losses of the shortest loop that does the same work."""
    tokenizer = build_tokenizer("octavo_bpe_2048")
    spec = models.get("llama3")
    model = Llama(spec.configure(spec.args("debugmodel"), tokenizer.vocab_size, LENGTH))
    init_weights(model, seed=42)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    data = build_dataloader(
        dataset="shakespeare",
        dataset_path=None,
        tokenizer=tokenizer,
        seq_len=LENGTH,
        local_batch_size=BATCH,
        dp_rank=0,
        dp_degree=1,
        seed=42,
    )
    while True:
        tokens, labels = data.next_batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def trainer_steps(steps: int, folder: str) -> Iterator[int]:
    """The trainer's own loop, step by step."""
    flags = {
        "job.dump_folder": folder,
        "training.seq_len": LENGTH,
        "training.local_batch_size": BATCH,
        "training.steps": steps,
        "training.mixed_precision_param": "float32",
        "lr_scheduler.warmup_steps": 0,
        "lr_scheduler.decay_ratio": 0,
        "optimizer.lr": 1e-3,
        "activation_checkpoint.mode": "none",
        "metrics.log_freq": 1,
    }
    return Trainer(config.load([f"--{key}={value}" for key, value in flags.items()])).steps()


def seconds(side: Iterator[Any]) -> float:
    """Time of one step."""
    start = time.perf_counter()
    next(side)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="pairs of steps, after three that don't count")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--smoke", action="store_true", help="seconds: does it work at all?")
    options = parser.parse_args()
    global LENGTH
    if options.smoke:
        options.steps, LENGTH = 1, 16
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    logging.getLogger("octavo").setLevel(logging.WARNING)

    warmup = 3
    with tempfile.TemporaryDirectory() as folder:
        sides = {"bare": bare_steps(), "trainer": trainer_steps(warmup + options.steps, folder)}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for pair in range(warmup + options.steps):
            for name in sorted(sides, reverse=bool(pair % 2)):
                times[name].append(seconds(sides[name]))
        mesh.finish()

    counted = {name: taken[warmup:] for name, taken in times.items()}
    ratios = [bare / trainer for bare, trainer in zip(counted["bare"], counted["trainer"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    rates = {name: BATCH * LENGTH / statistics.median(taken) for name, taken in counted.items()}
    result = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "pairs": options.steps,
        "median_tokens_per_second": rates,
        "median_ratio": statistics.median(ratios),
        "quartiles_of_ratio": quartiles,
        "ratios": ratios,
    }
    print(f"torch {torch.__version__}, {result['threads']} threads, {options.steps} pairs of steps")
    for name, rate in rates.items():
        print(f"{name:8} median {rate:,.0f} tokens/s")
    print(
        f"trainer / bare tokens/s: median {result['median_ratio']:.3f}, "
        f"quartiles {quartiles[0]:.3f} and {quartiles[2]:.3f}"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
