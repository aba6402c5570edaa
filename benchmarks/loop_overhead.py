"""What the trainer costs over a bare loop: tokens/s of both, same model, same batches, one process, on a CPU.

    python benchmarks/loop_overhead.py [--steps 12] [--rounds 5] [--json FILE]

Both sides train the debug model in float32 with fused AdamW, clipping and a loss read back on every step;
the trainer also logs, writes metrics, collects garbage and asks for checkpoints and profiles as it always
does. The sides alternate, the first one changes from round to round, and the figure is the median over the
rounds of bare time / trainer time.
"""

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.nn.functional as F
from torch import nn

from octavo import config, models
from octavo.components.data import build_dataloader
from octavo.components.init import init_weights
from octavo.components.tokenizer import build_tokenizer
from octavo.distributed import mesh
from octavo.models.llama3.model import Llama
from octavo.train import Trainer

BATCH, LENGTH = 8, 256


def bare_loop(steps: int) -> float:
    """Seconds that `steps` steps take in the shortest loop that does the same work."""
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
    losses = []
    start = time.perf_counter()
    for _ in range(steps):
        tokens, labels = data.next_batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return time.perf_counter() - start


def trainer_loop(steps: int, folder: Path) -> float:
    """Seconds that the trainer takes for `steps` steps, from the first to the farewell."""
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
    job = config.load([f"--{key}={value}" for key, value in flags.items()])
    trainer = Trainer(job)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    mesh.finish()
    gc.enable()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="steps of each side in a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    logging.getLogger("octavo").setLevel(logging.WARNING)

    seconds: dict[str, list[float]] = {"bare": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        sides = {"bare": bare_loop, "trainer": lambda steps: trainer_loop(steps, Path(folder))}
        for round_ in range(options.rounds + 1):
            for name in sorted(sides, reverse=bool(round_ % 2)):
                taken = sides[name](options.steps)
                if round_ > 0:
                    seconds[name].append(taken)

    tokens = options.steps * BATCH * LENGTH
    rates = {name: [tokens / s for s in taken] for name, taken in seconds.items()}
    ratios = [bare / trainer for bare, trainer in zip(seconds["bare"], seconds["trainer"], strict=True)]
    result = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "tokens_per_second": rates,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }
    print(f"torch {torch.__version__}, {result['threads']} threads, {options.rounds} x {options.steps} steps")
    for name, values in rates.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"{name:8} tokens/s: median {statistics.median(values):,.0f}, {spread}")
    by_round = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"trainer / bare tokens/s: median {result['median_ratio']:.3f}; by round {by_round}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
