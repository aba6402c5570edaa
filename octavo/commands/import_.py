"""`octavo import`: a published model becomes a checkpoint that training starts from.

    octavo import Llama-3.2-1B --out imported
    ./run_train.sh --model.flavor 1B --model.hf_assets_path Llama-3.2-1B --checkpoint.initial_load_path
    imported

The source is a Hugging Face folder (`config.json`, `*.safetensors`) or Meta's own (`params.json`,
`consolidated.NN.pth`). What is read is tensors and JSON: nothing of the source is run. The checkpoint holds
the model alone, in float32, the dtype that it is trained in, and is written under the same protocol as a
training run's; the model is held in memory once.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import octavo
from octavo import models
from octavo.checkpoint.checkpointer import Checkpointer
from octavo.commands.argparser import Parser
from octavo.config import ConfigError, JobConfig
from octavo.config.schema import Checkpoint
from octavo.core.logging import init_logger
from octavo.hf import safetensors_folder
from octavo.hf.folder_writer import check_free
from octavo.hf.model_sources import build, differences, hf_model, hf_weights, open_tokenizer
from octavo.hf.stored_weights import Weights, load, shapes_of
from octavo.models.llama3 import meta
from octavo.tokenizer import Tokenizer


def _parser() -> Parser:
    parser = Parser(
        "octavo import",
        "Make a checkpoint from a model in Hugging Face's format, or from Meta's original Llama 3 files.\n"
        "Training starts from it with --checkpoint.initial_load_path FOLDER.",
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a folder with *.safetensors, or with consolidated.NN.pth"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--flavor",
        metavar="NAME",
        help="the model's size, as model.flavor names it (default: found by its config)",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="the model's tokenizer (default: the one in SOURCE)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`octavo import`: the exit code. Raises `ConfigError` for a mistake in what was asked."""
    options = _parser().read(sys.argv[1:] if argv is None else argv)
    source, out = options.source.expanduser(), options.out.expanduser()
    check_free(out)
    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder")
    tokenizer_path = options.tokenizer or str(source)
    tokenizer = open_tokenizer(tokenizer_path, f"{source} should hold the model's tokenizer")
    if safetensors_folder.is_folder(source):
        spec, flavor, args, weights = _hugging_face(source, options.flavor, tokenizer)
    elif (source / meta.PARAMS).is_file():
        spec, flavor, args, weights = _original(source, options.flavor, tokenizer)
    else:
        raise ConfigError(
            f"{source}: neither *.safetensors with a config.json nor consolidated.NN.pth with a params.json"
        )
    job = JobConfig()
    job.model.name, job.model.flavor = spec.name, flavor
    job.model.hf_assets_path = (
        os.path.abspath(tokenizer_path) if Path(tokenizer_path).exists() else tokenizer_path
    )
    job.training.seq_len = args.max_seq_len
    print(f"Importing {source} as {spec.name} {flavor}")
    write_checkpoint(out, load(build(spec, args), weights, torch.float32, "cpu"), job)
    print(
        f"Written: {out}. To train from it: --model.flavor {flavor} "
        f"--model.hf_assets_path {job.model.hf_assets_path} --checkpoint.initial_load_path {out}"
    )
    return 0


def write_checkpoint(folder: Path, model: nn.Module, job: JobConfig) -> None:
    """Write `model` alone as the checkpoint of step 0 into `folder`; `job` tells which model it is."""
    init_logger()
    settings = Checkpoint(enable=True, last_save_model_only=True)
    state = {
        "octavo": octavo.__version__,
        "torch": torch.__version__,
        "tokens_seen": 0,
        "config": job.to_dict(),
    }
    with _alone():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        checkpointer = Checkpointer(settings, folder, model, optimizer)
        checkpointer.save(0, 0, state)
        checkpointer.wait()


@contextmanager
def _alone() -> Iterator[None]:
    """A process group of this process alone, without a network."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _hugging_face(
    source: Path, flavor: str | None, tokenizer: Tokenizer
) -> tuple[models.ModelSpec, str, Any, Weights]:
    spec, found = hf_model(source)
    flavor, args = _find_flavor(source, spec, flavor, found, tokenizer)
    return spec, flavor, args, hf_weights(source, spec, args, model=f"{spec.name} {flavor}")


def _find_flavor(
    source: Path, spec: models.ModelSpec, wanted: str | None, found: Any, tokenizer: Tokenizer
) -> tuple[str, Any]:
    """The flavor with the sizes that were found (or the one that is wanted, if it has them), and its args."""
    misfits: dict[str, list[str]] = {}
    for name in [wanted] if wanted else spec.flavors:
        flavor_args = spec.args(name)
        try:
            args = spec.configure(flavor_args, tokenizer.vocab_size, found.max_seq_len)
        except ConfigError as error:
            misfits[name] = [str(error)]
            continue
        misfits[name] = differences(found, args)
        if not misfits[name]:
            return name, args
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    remedy = "leave --flavor out" if wanted else "register a model of these sizes (docs/your_own_model.md)"
    raise ConfigError(
        f"{source} is not {spec.name} {nearest}{'' if wanted else ', the nearest flavor'}: "
        f"{'; '.join(misfits[nearest])}; {remedy}"
    )


def _original(
    source: Path, wanted: str | None, tokenizer: Tokenizer
) -> tuple[models.ModelSpec, str, Any, Weights]:
    spec = models.get("llama3")
    flavor = meta.flavor_of(meta.read_params(source), spec.flavors)
    if wanted not in (None, flavor):
        raise ConfigError(
            f"{source} is llama3 {flavor} by its {meta.PARAMS}, not {wanted}; leave --flavor out"
        )
    flavor_args = spec.args(flavor)
    args = spec.configure(flavor_args, tokenizer.vocab_size, flavor_args.max_seq_len)
    shapes = shapes_of(build(spec, args))
    read = meta.open_files(source, shapes, tied=args.tie_embeddings)
    return spec, flavor, args, Weights(str(source), shapes, read)
