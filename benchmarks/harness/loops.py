"""The two sides that loop_overhead.py compares, and the process that times them.

    python -m benchmarks.harness.loops '{"sides": ["bare"], ...}'       the fields of a `Case`, as JSON

prints one JSON object: seconds of every step by side, and the process's peak of resident memory.

The bare loop does the trainer's work and nothing else, as its author would write it by hand: weights in
float32, fused AdamW, clipping, a loss read back on every step. In bfloat16 it keeps a copy of the weights to
compute with, since that is the cheapest way to the trainer's numbers (autocast casts other tensors, FSDP2
copies more). Several processes take FSDP2, a group for each layer.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from octavo import config, models
from octavo.data.build import build_source
from octavo.data.dataloader import DataLoader
from octavo.data.sample_source import SourceOptions
from octavo.distributed import mesh
from octavo.models.init import init_weights
from octavo.models.transformer import Transformer
from octavo.tokenizer import build_tokenizer
from octavo.train.run_record import processor

BATCH = 8


@dataclass(frozen=True)
class Case:
    """sides: "bare", "trainer" or both, which take single steps in turn. length: of a sequence, in tokens."""

    sides: Sequence[str]
    precision: str
    compiled: bool
    steps: int
    length: int = 256


def bare_steps(case: Case) -> Iterator[float]:
    """Build the shortest loop that does the same work; its steps yield their losses."""
    tokenizer = build_tokenizer("octavo_bpe_2048")
    spec = models.get("llama3")
    model = Transformer(spec.configure(spec.args("debugmodel"), tokenizer.vocab_size, case.length))
    init_weights(model, seed=42)
    if case.compiled:
        for layer in model.layers.values():
            layer.compile(fullgraph=True)
    rank, processes = _place()
    dtype = getattr(torch, case.precision)
    masters = None
    if processes > 1:
        _shard(model, dtype)
    elif dtype is not torch.float32:
        masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        for p in model.parameters():
            p.data = p.to(dtype)
    optimizer = torch.optim.AdamW(
        masters or model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    source = build_source("shakespeare", SourceOptions(tokenizer, case.length, seed=42))
    data = DataLoader(source, local_batch_size=BATCH, dp_rank=rank, dp_degree=processes)

    def steps() -> Iterator[float]:
        while True:
            tokens, labels = data.next_batch()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten())
            loss.backward()
            if masters:
                _hand_on_gradients(model, masters)
            nn.utils.clip_grad_norm_(masters or model.parameters(), 1.0)
            optimizer.step()
            if masters:
                with torch.no_grad():
                    torch._foreach_copy_(list(model.parameters()), masters)
            loss = loss.detach()
            if processes > 1:
                dist.all_reduce(loss)
            yield loss.item() / processes

    return steps()


def _shard(model: Transformer, dtype: torch.dtype) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    layers = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for group in (model.tok_embeddings, *model.layers.values(), [model.norm, model.output]):
        fully_shard(group, mp_policy=layers, reshard_after_forward=not isinstance(group, list))
    fully_shard(model, mp_policy=layers)


def _hand_on_gradients(model: nn.Module, masters: Sequence[Tensor]) -> None:
    for parameter, master in zip(model.parameters(), masters, strict=True):
        assert parameter.grad is not None
        master.grad, parameter.grad = parameter.grad.float(), None


def _place() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def trainer_steps(case: Case, folder: str) -> Iterator[int]:
    """The trainer's own loop, step by step."""
    from octavo.train.trainer import Trainer  # the bare loop's process has no use for it

    flags = {
        "job.dump_folder": folder,
        "training.seq_len": case.length,
        "training.local_batch_size": BATCH,
        "training.steps": case.steps,
        "training.mixed_precision_param": case.precision,
        "training.compile": str(case.compiled).lower(),
        "lr_scheduler.warmup_steps": 0,
        "lr_scheduler.decay_ratio": 0,
        "optimizer.lr": 1e-3,
        "activation_checkpoint.mode": "none",
        "metrics.log_freq": 1,
    }
    return Trainer(config.load([f"--{key}={value}" for key, value in flags.items()])).steps()


def run(case: Case) -> dict[str, Any]:
    """Take the steps; seconds of each by side, and the peak of resident memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        make = {"bare": lambda: bare_steps(case), "trainer": lambda: trainer_steps(case, folder)}
        # The trainer first: it makes the process group, and insists on that.
        sides = {name: make[name]() for name in sorted(case.sides, reverse=True)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for step in range(case.steps):
            for name in sorted(sides, reverse=bool(step % 2)):
                start = time.perf_counter()
                next(sides[name])
                seconds[name].append(time.perf_counter() - start)
        mesh.finish()
    return {
        "machine": {
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "seconds": seconds,
        "peak_mib": _peak_mib(),
    }


def _peak_mib() -> float | None:
    """Of this program alone: `getrusage` counts what the process was before it became this program, too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) / 1024


if __name__ == "__main__":
    logging.getLogger("octavo").setLevel(logging.WARNING)
    result = run(Case(**json.loads(sys.argv[1])))
    if _place()[0] == 0:
        print(json.dumps(result))
