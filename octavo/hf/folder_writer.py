"""Writes a model as a folder that transformers loads: weights, configs, tokenizer.

The folder is written under another name beside its place and renamed when all of it is on the disk, so what
has the name is whole. A folder that holds anything is never written over.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo import models
from octavo.config import ConfigError
from octavo.core.fs import sync
from octavo.hf import safetensors_folder
from octavo.hf.stored_weights import Weights
from octavo.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_SHARD = "5GB"

_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def check_free(out: Path) -> None:
    """`ConfigError` unless `out` is a folder that can be made, or an empty one."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already, and not empty; name another --out, or remove it first")


class HfLayout:
    """Which of a model's parameters goes where, under which name: the plan of an export."""

    def __init__(
        self, spec: models.ModelSpec, args: Any, weights: Weights, dtype: torch.dtype, shard_bytes: int
    ):
        if spec.hugging_face is None:
            raise ConfigError(
                f"the model {spec.name} has no form in transformers: its ModelSpec has no hugging_face"
            )
        self._form, self._args, self._weights, self._dtype = spec.hugging_face, args, weights, dtype
        self._ours = {}
        sizes = {}
        for name, shape in weights.shapes.items():
            (theirs,) = self._form.to_names({name: torch.empty(shape, device="meta", dtype=dtype)}, args)
            self._ours[theirs] = name
            sizes[theirs] = safetensors_folder.element_size(dtype) * torch.Size(shape).numel()
        self.plan = safetensors_folder.shards(sizes, shard_bytes)
        self.total = sum(sizes.values())
        self.config = {**self._form.to_config(args), "torch_dtype": str(dtype).removeprefix("torch.")}

    def read(self, theirs: str) -> Tensor:
        """One tensor as it is exported."""
        name = self._ours[theirs]
        tensor = self._weights.read(name).to(self._dtype)
        (renamed,) = self._form.to_names({name: tensor}, self._args).values()
        return renamed.contiguous()


def write_folder(
    out: Path, layout: HfLayout, tokenizer: Tokenizer, written: Callable[[Path], None] = lambda file: None
) -> None:
    """Write the model into `out`, whole or not at all. `written` is called with each file of weights.

    Raises:
        ConfigError: `out` holds something, or there is no room for the model.
    """
    out = out.expanduser().absolute()
    check_free(out)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < layout.total:
            raise ConfigError(
                f"{out}: {layout.total:,} bytes are needed, and {free:,} are free; name another folder"
            )
        safetensors_folder.write(partial, layout.plan, layout.read, written)
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        safetensors_folder.write_json(partial / "config.json", {**layout.config, **ends})
        safetensors_folder.write_json(
            partial / "generation_config.json", {key: id_ for key, id_ in ends.items() if id_ is not None}
        )
        write_tokenizer(partial, tokenizer)
        sync(partial)
        if out.exists():
            out.rmdir()  # it was found empty
        partial.rename(out)
        sync(out.parent)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out}: {error.strerror or error}; nothing was written"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer's own files where they are Hugging Face's, else a `tokenizer.json` made from it."""
    source = Path(tokenizer.source)
    if source.suffix == ".json":
        shutil.copyfile(source, folder / "tokenizer.json")
    else:
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    sync(folder / "tokenizer.json")
    for name in _TOKENIZER_FILES:
        if source.with_name(name).is_file():
            shutil.copyfile(source.with_name(name), folder / name)
            sync(folder / name)
    config = folder / "tokenizer_config.json"
    told = json.loads(config.read_bytes()) if config.exists() else {}
    ends = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    safetensors_folder.write_json(config, {"tokenizer_class": "PreTrainedTokenizerFast", **ends, **told})
