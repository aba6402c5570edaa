"""Meta's Llama 3 checkpoints: `params.json` and `consolidated.NN.pth`, one file per model-parallel rank.

Names and row order are ours. Matrices are sharded over the files: by rows where the outputs are heads,
feed-forward units or vocabulary, by columns where the inputs are; norms are replicated. With more files than
key/value heads, neighbouring files repeat the shards of wk and wv.

`params.json` contains neither the factor of the rotary scaling nor whether embeddings are tied. Both are
properties of the release, so they are taken from the flavor that matches the sizes in it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoint.reader import load_tensors
from octavo.config import ConfigError
from octavo.core.fs import read_json_object
from octavo.families import ModelArgs

PARAMS = "params.json"
_BUFFERS = ("rope.freqs",)
_ROWS = re.compile(r"tok_embeddings|output|.*\.(wq|wk|wv|w1|w3)")
_COLUMNS = re.compile(r".*\.(wo|w2)")


def shard_dim(name: str) -> int | None:
    """The dimension along which the parameter called `name` is sharded; None: it is replicated."""
    module = name.removesuffix(".weight")
    if _ROWS.fullmatch(module):
        return 0
    return 1 if _COLUMNS.fullmatch(module) else None


def merge_shards(name: str, shards: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The parameter `name` of `shape`, from its shard in each file, in the files' order.

    Raises:
        ConfigError: the shards do not give that shape, or replicas differ.
    """
    replicas = _count_replicas(name, shards, shape)
    try:
        merged, *copies = (
            torch.cat(list(shards[first::replicas]), shard_dim(name) or 0)
            if len(shards) > replicas
            else shards[first]
            for first in range(replicas)
        )
        fits = tuple(merged.shape) == shape
    except RuntimeError:  # the shards' other dimensions differ
        fits = False
    if not fits:
        shapes = ", ".join(str(tuple(shard.shape)) for shard in shards)
        raise ConfigError(
            f"{name} is {shapes} in {len(shards)} file(s), but {shape} by params.json; are all "
            "consolidated.NN.pth of the model in the folder?"
        )
    if any(not torch.equal(merged, copy) for copy in copies):
        raise ConfigError(f"{name} should be equal in several files, but differs: they are of two models")
    return merged


def _count_replicas(name: str, shards: Sequence[Tensor], shape: tuple[int, ...]) -> int:
    """How many neighbouring files have the same shard."""
    dim = shard_dim(name)
    if dim is None:
        return len(shards)
    rows = sum(shard.shape[dim] if shard.ndim > dim else 0 for shard in shards)
    replicas = max(1, rows // shape[dim])
    return replicas if len(shards) % replicas == 0 else 1


def find_flavor(params: Mapping[str, Any], flavors: Mapping[str, ModelArgs]) -> str:
    """The flavor that `params.json` describes; `ConfigError` if there is none."""
    sizes = _parse_params(params)
    scaled = params.get("use_scaled_rope", False) is True
    for name, args in flavors.items():
        same = all(
            getattr(args, key) == value or (key == "vocab_size" and not args.vocab_size)
            for key, value in sizes.items()
        )
        if same and (args.rope_scaling is not None) == scaled:
            return name
    listed = ", ".join(f"{key} {value}" for key, value in sizes.items())
    raise ConfigError(
        f"params.json: no flavor of llama3 has {listed}, {'with' if scaled else 'without'} rotary scaling"
    )


def _parse_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelArgs` that `params.json` contains."""
    try:
        dim, multiple = int(params["dim"]), int(params.get("multiple_of", 256))
        hidden = int(params.get("ffn_dim_multiplier", 1.0) * int(2 * 4 * dim / 3))
        sizes = {
            "dim": dim,
            "n_layers": int(params["n_layers"]),
            "n_heads": int(params["n_heads"]),
            "n_kv_heads": int(params.get("n_kv_heads") or params["n_heads"]),
            "hidden_dim": -(-hidden // multiple) * multiple,
            "rope_theta": float(params.get("rope_theta", 10_000.0)),
            "norm_eps": float(params.get("norm_eps", 1e-5)),
        }
        if int(params.get("vocab_size", -1)) > 0:
            sizes["vocab_size"] = int(params["vocab_size"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"params.json: not Llama 3's ({type(error).__name__}: {error})") from None
    return sizes


def read_params(folder: Path) -> Mapping[str, Any]:
    """The content of the folder's `params.json`; `ConfigError` if it is not a JSON object."""
    path = folder / PARAMS
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); download it again") from None


def open_files(folder: Path, shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> Callable[[str], Tensor]:
    """A function that reads one parameter by name. `shapes`: those of all the model's parameters.

    The files are mapped into memory, so only the parameter that is read takes memory.

    Raises:
        ConfigError: a file is missing or damaged, needs more than tensors, or has other parameters.
    """
    paths = sorted(folder.glob("consolidated.*.pth"))
    expected = [folder / f"consolidated.{number:02}.pth" for number in range(len(paths))]
    if not paths or paths != expected:
        found = ", ".join(path.name for path in paths) or "none"
        raise ConfigError(f"{folder}: expected consolidated.00.pth, consolidated.01.pth, …; found: {found}")
    loaded = [_load(path) for path in paths]
    known = {*shapes, *_BUFFERS, *(["output.weight"] if tied else [])}
    for path, tensors in zip(paths, loaded, strict=True):
        missing = [name for name in shapes if name not in tensors]
        extra = [name for name in tensors if name not in known]
        if missing or extra:
            problem = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model lacks"
            raise ConfigError(f"{path} {problem}; it does not match params.json")

    def read_merged(name: str, shape: tuple[int, ...]) -> Tensor:
        return merge_shards(name, [tensors[name] for tensors in loaded], shape)

    def read(name: str) -> Tensor:
        parameter = read_merged(name, shapes[name])
        has_copy = tied and name == "tok_embeddings.weight" and "output.weight" in loaded[0]
        if has_copy and not torch.equal(parameter, read_merged("output.weight", shapes[name])):
            raise ConfigError(
                f"{folder}: output.weight differs from tok_embeddings.weight, but they are tied"
            )
        return parameter

    return read


def _load(path: Path) -> dict[str, Tensor]:
    tensors = load_tensors(path, mmap=True)
    if not isinstance(tensors, dict) or not all(isinstance(one, Tensor) for one in tensors.values()):
        raise ConfigError(f"{path}: not a dictionary of tensors; download Meta's file again")
    return tensors
