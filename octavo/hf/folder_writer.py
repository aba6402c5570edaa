"""Saves a model as a folder that transformers loads: weights, configs, tokenizer.

The folder is written under a temporary name and renamed when everything is on disk, so it is always complete.
A folder that is not empty is never overwritten.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo import models
from octavo.config import ConfigError
from octavo.core.fs import read_json_object, read_whole, sync, write_file
from octavo.hf import safetensors_folder
from octavo.hf.stored_weights import Weights
from octavo.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_SHARD_SIZE = "5GB"

_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def require_empty(out: Path) -> None:
    """`ConfigError` if `out` exists, unless it is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} already exists and is not empty; name another --out, or remove it first")


class ExportPlan:
    """The names, dtype and files of an exported model.

    Attributes:
        shards: Hugging Face's names, one list per file.
        total_bytes: of the weights.
        config: the content of `config.json`, without token ids.
    """

    def __init__(
        self, spec: models.ModelSpec, args: Any, weights: Weights, dtype: torch.dtype, shard_bytes: int
    ):
        if spec.hugging_face is None:
            raise ConfigError(f"the model {spec.name} cannot be exported: its ModelSpec has no hugging_face")
        self._format, self._args, self._weights, self._dtype = spec.hugging_face, args, weights, dtype
        self._our_names: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for name, shape in weights.shapes.items():
            theirs = self._format.to_names({name: torch.empty(shape, device="meta", dtype=dtype)}, args)
            self._our_names |= dict.fromkeys(theirs, name)
            sizes |= {hf_name: dtype.itemsize * tensor.numel() for hf_name, tensor in theirs.items()}
        self._last: tuple[str, dict[str, Tensor]] = "", {}  # what one of ours became, for the next `read`
        self.shards = safetensors_folder.split_into_shards(sizes, shard_bytes)
        self.total_bytes = sum(sizes.values())
        self.config = {**self._format.to_config(args), "torch_dtype": str(dtype).removeprefix("torch.")}

    def read(self, hf_name: str) -> Tensor:
        """One exported tensor. In the order of `shards`, each of ours is read once."""
        name = self._our_names[hf_name]
        if name != self._last[0]:
            tensor = self._weights.read(name).to(self._dtype)
            self._last = name, self._format.to_names({name: tensor}, self._args)
        return self._last[1][hf_name].clone(memory_format=torch.contiguous_format)


def save_pretrained(
    out: Path, plan: ExportPlan, tokenizer: Tokenizer, on_written: Callable[[Path], None] = lambda file: None
) -> None:
    """Save the model atomically as the folder `out`. `on_written` is called with each file of weights.

    Raises:
        ConfigError: `out` is not empty, or the disk has no space for the model.
    """
    out = out.expanduser().absolute()
    require_empty(out)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed export
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < plan.total_bytes:
            raise ConfigError(
                f"{out}: {plan.total_bytes:,} bytes are needed and {free:,} are free; name another folder"
            )
        safetensors_folder.write_shards(partial, plan.shards, plan.read, on_written)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        safetensors_folder.write_json(partial / "config.json", {**plan.config, **ids})
        safetensors_folder.write_json(
            partial / "generation_config.json", {key: id_ for key, id_ in ids.items() if id_ is not None}
        )
        save_tokenizer(partial, tokenizer)
        sync(partial)
        if out.exists():
            out.rmdir()  # it is empty
        partial.rename(out)
        sync(out.parent)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out}: {error.strerror or error}; nothing was written"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Copy the tokenizer's files if they are Hugging Face's, else convert them to `tokenizer.json`."""
    source = Path(tokenizer.source)
    text = read_whole(source).decode() if source.suffix == ".json" else tokenizer.to_json()
    write_file(folder / "tokenizer.json", tokenizer.with_template(text), durable=True)
    for name in _TOKENIZER_FILES:
        if source.with_name(name).is_file():
            shutil.copyfile(source.with_name(name), folder / name)
            sync(folder / name)
    config = folder / "tokenizer_config.json"
    existing = read_json_object(config) if config.exists() else {}
    tokens = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    wanted = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **existing}
    safetensors_folder.write_json(config, {**wanted, "add_bos_token": tokenizer.bos_id is not None})
