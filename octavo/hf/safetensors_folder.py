"""Folders of `.safetensors` files: read tensor by tensor, written file by file.

    model.safetensors                        one file, or
    model-00001-of-00003.safetensors …       several
    model.safetensors.index.json             which tensor is in which file

The format is a JSON header and raw bytes: nothing in it can run. Reading needs no more memory than the tensor
that is asked for, writing no more than one file's tensors, at most `shard_bytes` or one tensor.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.config import ConfigError
from octavo.core.fs import sync, write_file
from octavo.hf.stored_weights import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_READABLE = {"F64", "F32", "F16", "BF16"}


def library() -> Any:
    """The package `safetensors`; `ConfigError` where it is not installed."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ConfigError("the package safetensors is not installed: pip install 'octavo[train]'") from None
    return safetensors


@dataclass(frozen=True)
class Stored:
    """One tensor of a folder: the file that it is in, and its shape."""

    file: Path
    shape: Shape


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder with a model in safetensors files."""
    return path.is_dir() and any(path.glob("*.safetensors"))


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder, under the names in its files.

    Raises:
        ConfigError: a file is missing, damaged, or stores numbers that are not plain floats.
    """
    found: dict[str, Stored] = {}
    for file in _files(folder):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                slice_ = opened.get_slice(name)
                if slice_.get_dtype() not in _READABLE:
                    raise ConfigError(
                        f"{file}: {name} is stored as {slice_.get_dtype()}; octavo reads weights in "
                        f"{', '.join(sorted(_READABLE))}: take the model's unquantised release"
                    )
                if name in found:
                    raise ConfigError(
                        f"{folder}: {name} is in {found[name].file.name} and in {file.name}; "
                        f"keep one model in a folder, with its {INDEX}"
                    )
                found[name] = Stored(file, tuple(slice_.get_shape()))
    return found


def read(stored: Stored, name: str) -> Tensor:
    """One tensor on the CPU, in the dtype that is stored."""
    with _open(stored.file) as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def _open(file: Path) -> Any:
    safetensors = library()
    try:
        return safetensors.safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; fetch or export the model again") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"{file} is no safetensors file, or damaged ({error}); fetch or export the model again"
        ) from None


def _files(folder: Path) -> list[Path]:
    """The model's files: those of the index where there is one, else all."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: no index of safetensors files ({error}); fetch it again") from None
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", str(name)):
            raise ConfigError(f"{index}: {name!a} is not the name of a file in the folder; refused")
    return [folder / name for name in names]


def shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, cut into files of at most `most` bytes (a larger tensor has its own)."""
    cut: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not cut or filled + size > most:
            cut.append([])
            filled = 0
        cut[-1].append(name)
        filled += size
    return cut


def write(
    folder: Path,
    plan: Sequence[Sequence[str]],
    read: Callable[[str], Tensor],
    written: Callable[[Path], None] = lambda file: None,
) -> None:
    """Write the tensors called as `plan` says, one list a file, and the index.

    `read` is called in that order; `written` with each file when it is on the disk.
    """
    save = library().torch.save_file
    where: dict[str, str] = {}
    total = 0
    for number, names in enumerate(plan, 1):
        file = folder / (SINGLE if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors")
        group = {name: read(name).contiguous() for name in names}
        file.touch()
        mode = (
            file.stat().st_mode
        )  # what the umask gives; the library makes files that only their owner reads
        save(group, file, metadata={"format": "pt"})
        file.chmod(mode)
        sync(file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in group.values())
        where |= dict.fromkeys(names, file.name)
        del group
        written(file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to disk as `path`."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", durable=True)


def bytes_of(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a plain number as bytes; `ConfigError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[kMGT]i?B|B)", text.strip(), re.IGNORECASE)
    units = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
    size = 0
    if match:
        unit = match[2].lower()
        size = int(float(match[1]) * (1024 if "i" in unit else 1000) ** units[unit.rstrip("ib")])
    if size < 1:
        raise ConfigError(f"--shard_size {text}: expected a size such as 5GB, 500MB or 2GiB")
    return size


def element_size(dtype: torch.dtype) -> int:
    """Bytes of one number."""
    return torch.empty((), dtype=dtype).element_size()
