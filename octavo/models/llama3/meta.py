"""Llama 3 as Meta publishes it: `params.json` and `consolidated.NN.pth`, one file for each model-parallel
rank.

Names and row order are ours. What differs is that a matrix may be cut into as many pieces as there are files:
those that write heads, feed-forward units or vocabulary by rows, those that read them by columns; norms are
repeated. With more files than key/value heads, neighbouring files repeat the pieces of wk and wv.

`params.json` does not tell everything: neither the factor of the rotary scaling nor whether the embeddings
are tied. Both are properties of the release, so they are taken from the flavor whose sizes it tells.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoint.reader import load_tensors
from octavo.config import ConfigError
from octavo.models.llama3.model import LlamaArgs

PARAMS = "params.json"
_NOT_PARAMETERS = ("rope.freqs",)
_ROWS = re.compile(r"tok_embeddings|output|.*\.(wq|wk|wv|w1|w3)")
_COLUMNS = re.compile(r".*\.(wo|w2)")


def cut_dim(name: str) -> int | None:
    """The dimension along which the parameter called `name` is cut; None: each file has the whole."""
    module = name.removesuffix(".weight")
    if _ROWS.fullmatch(module):
        return 0
    return 1 if _COLUMNS.fullmatch(module) else None


def merge(name: str, pieces: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """One whole parameter of `shape` out of its piece in each file, in the files' order.

    Raises:
        ConfigError: the pieces do not give that shape, or copies differ.
    """
    repeats = _repeats(name, pieces, shape)  # how many neighbouring files have the same piece
    try:
        whole, *copies = (
            torch.cat(list(pieces[first::repeats]), cut_dim(name) or 0)
            if len(pieces) > repeats
            else pieces[first]
            for first in range(repeats)
        )
        fits = tuple(whole.shape) == shape
    except RuntimeError:  # pieces that do not stand side by side
        fits = False
    if not fits:
        there = ", ".join(str(tuple(piece.shape)) for piece in pieces)
        raise ConfigError(
            f"{name} is {there} in {len(pieces)} file(s), and {shape} by params.json; are all "
            "consolidated.NN.pth of the model in the folder?"
        )
    if any(not torch.equal(whole, copy) for copy in copies):
        raise ConfigError(f"{name} should be the same in several files, and differs: they are of two models")
    return whole


def _repeats(name: str, pieces: Sequence[Tensor], shape: tuple[int, ...]) -> int:
    dim = cut_dim(name)
    if dim is None:
        return len(pieces)
    rows = sum(piece.shape[dim] if piece.ndim > dim else 0 for piece in pieces)
    repeats = max(1, rows // shape[dim])
    return repeats if len(pieces) % repeats == 0 else 1


def flavor_of(params: Mapping[str, Any], flavors: Mapping[str, LlamaArgs]) -> str:
    """The flavor that `params.json` describes; `ConfigError` if there is none."""
    told = _told(params)
    scaled = params.get("use_scaled_rope", False) is True
    for name, args in flavors.items():
        same = all(
            getattr(args, key) == value or (key == "vocab_size" and not args.vocab_size)
            for key, value in told.items()
        )
        if same and (args.rope_scaling is not None) == scaled:
            return name
    sizes = ", ".join(f"{key} {value}" for key, value in told.items())
    raise ConfigError(
        f"params.json: no flavor of llama3 has {sizes}, {'with' if scaled else 'without'} rotary scaling"
    )


def _told(params: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `LlamaArgs` that `params.json` tells."""
    try:
        dim, multiple = int(params["dim"]), int(params.get("multiple_of", 256))
        hidden = int(params.get("ffn_dim_multiplier", 1.0) * int(2 * 4 * dim / 3))
        told = {
            "dim": dim,
            "n_layers": int(params["n_layers"]),
            "n_heads": int(params["n_heads"]),
            "n_kv_heads": int(params.get("n_kv_heads") or params["n_heads"]),
            "hidden_dim": -(-hidden // multiple) * multiple,
            "rope_theta": float(params.get("rope_theta", 10_000.0)),
            "norm_eps": float(params.get("norm_eps", 1e-5)),
        }
        if int(params.get("vocab_size", -1)) > 0:
            told["vocab_size"] = int(params["vocab_size"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"params.json: not Llama 3's ({type(error).__name__}: {error})") from None
    return told


def read_params(folder: Path) -> Mapping[str, Any]:
    """The content of the folder's `params.json`; `ConfigError` if it is no JSON object."""
    path = folder / PARAMS
    try:
        params = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(params, dict):
        raise ConfigError(f"{path}: no JSON object; fetch it again")
    return params


def open_files(folder: Path, shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> Callable[[str], Tensor]:
    """A function that reads one whole parameter by name. `shapes` are all that the model has.

    The files are mapped into memory, so that only the parameter that is read takes room.

    Raises:
        ConfigError: a file is missing or damaged, asks for more than tensors, or has other parameters.
    """
    paths = sorted(folder.glob("consolidated.*.pth"))
    wanted = [folder / f"consolidated.{number:02}.pth" for number in range(len(paths))]
    if not paths or paths != wanted:
        there = ", ".join(path.name for path in paths) or "none"
        raise ConfigError(f"{folder}: expected consolidated.00.pth, consolidated.01.pth, …; there: {there}")
    loaded = [_load(path) for path in paths]
    for path, tensors in zip(paths, loaded, strict=True):
        extra = [name for name in tensors if name not in shapes and name not in _NOT_PARAMETERS]
        if tied:
            extra = [name for name in extra if name != "output.weight"]
        missing = [name for name in shapes if name not in tensors]
        if missing or extra:
            what = f"has no {missing[0]}" if missing else f"has {extra[0]}, which the model has not"
            raise ConfigError(f"{path} {what}; it is of another model than params.json")

    def read(name: str) -> Tensor:
        whole = merge(name, [tensors[name] for tensors in loaded], shapes[name])
        if name == "tok_embeddings.weight" and tied and "output.weight" in loaded[0]:
            output = merge("output.weight", [tensors["output.weight"] for tensors in loaded], shapes[name])
            if not torch.equal(whole, output):
                raise ConfigError(
                    f"{folder}: output.weight differs from tok_embeddings.weight, to which it is tied"
                )
        return whole

    return read


def _load(path: Path) -> dict[str, Tensor]:
    tensors = load_tensors(path, mmap=True)
    if not isinstance(tensors, dict) or not all(isinstance(one, Tensor) for one in tensors.values()):
        raise ConfigError(f"{path}: no dictionary of tensors, so no model of Meta's")
    return tensors
