"""Measures activation memory, the bytes that autograd saves for backward, in each recipe of a comparison.

The model is built from fake tensors and run forward with one batch. Each saved storage is counted once;
parameters are not. This is the memory of eager layers without activation checkpointing.

    python -m octavo.commands.compare.activation_memory OUT

writes saved.json into the folders of the runs under OUT.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from octavo import config, models
from octavo.commands.compare.report.run_data import SAVED_FILE
from octavo.commands.compare.runs import read_plan
from octavo.core.fs import write_file
from octavo.tokenizer import build_tokenizer
from octavo.train import quantization
from octavo.train.build_model import model_args


def saved_bytes(flags: Sequence[str], dtype: torch.dtype) -> int:
    """Return the bytes that a forward of a job's model saves for backward, with a local batch and `dtype`."""
    job = config.load(flags)
    models.import_custom(job.experimental.custom_import, job.model.name)
    args = model_args(job, build_tokenizer(job.model.hf_assets_path))
    recipe = quantization.recipe_name(job.model.converters, job.float8)
    device = torch.device("cpu")
    saved: dict[int, Tensor] = {}  # by the storage

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(), _default_dtype(dtype):  # shapes and memory without values
        model = models.get(job.model.name).build(args)
        if recipe is not None:
            quantization.convert(model, recipe, job.float8, device, filters_given_on_cli=False)
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        tokens_BS = torch.zeros(job.training.local_batch_size, job.training.seq_len, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(tokens_BS)
        total = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    del logits
    return total


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new parameters of `dtype`, because a model of fake tensors cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main() -> int:
    out = Path(sys.argv[1])
    plan = read_plan(out)
    assert plan is not None
    for run in plan["runs"]:
        path = out / "runs" / run["name"] / SAVED_FILE
        if run["kind"] in ("baseline", "recipe") and not path.exists():
            record = json.loads((path.parent / "run.json").read_text())
            dtype = getattr(torch, record["high_precision_dtype"])
            write_file(path, json.dumps({"bytes": saved_bytes(run["flags"], dtype)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
