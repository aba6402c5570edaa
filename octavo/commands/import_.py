"""`octavo import`: converts a published model into a checkpoint that training starts from.

    octavo import Llama-3.2-1B --out imported
    ./run_train.sh --model.flavor 1B --model.hf_assets_path Llama-3.2-1B \\
        --checkpoint.initial_load_path imported

The source is a Hugging Face folder (`config.json`, `*.safetensors`) or Meta's original one (`params.json`,
`consolidated.NN.pth`). Only tensors and JSON are read; no code from the source is executed. The checkpoint
holds the model only, in float32, and is written the same way as a training run's. Memory holds one copy of
the model.
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
from octavo.hf import meta, safetensors_folder
from octavo.hf.folder_writer import require_empty
from octavo.hf.model_sources import (
    build_on_meta,
    compare_args,
    open_hf_weights,
    open_tokenizer,
    read_hf_config,
)
from octavo.hf.stored_weights import Weights, load_weights, shapes_of
from octavo.preflight import model_settings
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
        help="the model's size, as in model.flavor (default: detected from its config)",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="the model's tokenizer (default: the one in SOURCE)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo import`; returns the exit code. Raises `ConfigError` for a usage error."""
    options = _parser().read(sys.argv[1:] if argv is None else argv)
    source, out = options.source.expanduser(), options.out.expanduser()
    require_empty(out)
    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder")
    tokenizer_path = options.tokenizer or str(source)
    tokenizer = open_tokenizer(tokenizer_path, f"{source} should hold the model's tokenizer")
    if safetensors_folder.has_safetensors(source):
        spec, flavor, settings, args, weights = _read_hugging_face(source, options.flavor, tokenizer)
    elif (source / meta.PARAMS).is_file():
        spec, flavor, args, weights = _read_meta(source, options.flavor, tokenizer)
        settings = []
    else:
        raise ConfigError(
            f"{source}: neither *.safetensors with a config.json nor consolidated.NN.pth with a params.json"
        )
    job = JobConfig()
    job.model.name, job.model.flavor, job.model.args = spec.name, flavor, settings
    job.model.hf_assets_path = (
        os.path.abspath(tokenizer_path) if Path(tokenizer_path).exists() else tokenizer_path
    )
    job.training.seq_len = args.max_seq_len
    changed = f" --model.args {','.join(settings)}" if settings else ""
    print(f"Importing {source} as {spec.name} {flavor}{' with other sizes' if settings else ''}")
    model = build_on_meta(spec, spec.configure(args, tokenizer.vocab_size, 1))  # without long rotary tables
    write_checkpoint(out, load_weights(model, weights, torch.float32, "cpu"), job)
    print(
        f"Written: {out}. To train from it: --model.name {spec.name} --model.flavor {flavor}{changed} "
        f"--model.hf_assets_path {job.model.hf_assets_path} --checkpoint.initial_load_path {out}"
    )
    return 0


def write_checkpoint(folder: Path, model: nn.Module, job: JobConfig) -> None:
    """Write `model` into `folder` as a model-only checkpoint of step 0, with `job` as its config."""
    init_logger()
    settings = Checkpoint(enable=True, last_save_model_only=True)
    state = {
        "octavo": octavo.__version__,
        "torch": torch.__version__,
        "tokens_seen": 0,
        "config": job.to_dict(),
    }
    with _single_process_group():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        checkpointer = Checkpointer(settings, folder, model, optimizer)
        checkpointer.save(0, 0, state)
        checkpointer.wait()


@contextmanager
def _single_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _read_hugging_face(
    source: Path, requested: str | None, tokenizer: Tokenizer
) -> tuple[models.ModelSpec, str, list[str], Any, Weights]:
    """The model, its flavor (`requested`, or else the nearest), the settings in which it differs from that
    (none if requested), its arguments and weights.
    """
    spec, source_args = read_hf_config(source)
    found: dict[str, list[str]] = {}
    mismatches: dict[str, list[str]] = {}
    for flavor in [requested] if requested else spec.flavors:
        flavor_args = spec.args(flavor)
        try:
            args = spec.configure(flavor_args, tokenizer.vocab_size, source_args.max_seq_len)
        except ConfigError as error:
            mismatches[flavor] = [str(error)]
            continue
        mismatches[flavor] = compare_args(source_args, args)
        settings = model_settings.between(args, source_args)
        if not mismatches[flavor] or (settings is not None and not requested):
            found[flavor] = settings or []
    if not found:
        nearest = min(mismatches, key=lambda flavor: len(mismatches[flavor]))
        remedy = "leave --flavor out" if requested else "register such a model (docs/your_own_model.md)"
        raise ConfigError(
            f"{source} is not {spec.name} {nearest}{'' if requested else ', the nearest flavor'}: "
            f"{'; '.join(mismatches[nearest])}; {remedy}"
        )
    flavor, settings = min(found.items(), key=lambda item: len(item[1]))
    args = spec.configure(spec.args(flavor, settings), tokenizer.vocab_size, source_args.max_seq_len)
    return spec, flavor, settings, args, open_hf_weights(source, spec, args, model=f"{spec.name} {flavor}")


def _read_meta(
    source: Path, requested: str | None, tokenizer: Tokenizer
) -> tuple[models.ModelSpec, str, Any, Weights]:
    spec = models.get("llama3")
    flavor = meta.find_flavor(meta.read_params(source), spec.flavors)
    if requested not in (None, flavor):
        raise ConfigError(
            f"{source} is llama3 {flavor} by its {meta.PARAMS}, not {requested}; leave --flavor out"
        )
    flavor_args = spec.args(flavor)
    args = spec.configure(flavor_args, tokenizer.vocab_size, flavor_args.max_seq_len)
    shapes = shapes_of(build_on_meta(spec, args))
    read = meta.open_files(source, shapes, tied=args.tie_embeddings)
    return spec, flavor, args, Weights(str(source), shapes, read)
