"""Folders of `.safetensors` files, read one tensor at a time and written one file at a time.

    model.safetensors                        one file, or
    model-00001-of-00003.safetensors …       several
    model.safetensors.index.json             tensor -> file

A file is a JSON header and raw bytes, so reading it cannot run code. Reading needs memory for one tensor,
writing for the tensors of one file.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo.checkpoint.reader import Shape
from octavo.config import ConfigError
from octavo.core.fs import check_regular, read_json, sync, write_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_SUPPORTED_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3"}
_ROWS = 1024


def import_safetensors() -> Any:
    """The package `safetensors`; `ConfigError` if it is not installed."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ConfigError("the package safetensors is not installed: pip install 'octavo[train]'") from None
    return safetensors


@dataclass(frozen=True)
class StoredTensor:
    """The file, the shape and the dtype (as safetensors names it) of one tensor."""

    file: Path
    shape: Shape
    dtype: str


def has_safetensors(path: Path) -> bool:
    """Whether `path` is a folder with safetensors files."""
    return path.is_dir() and any(path.glob("*.safetensors"))


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder, by its name in the files.

    Raises:
        ConfigError: a file is missing or damaged, or a dtype is not supported.
    """
    found: dict[str, StoredTensor] = {}
    for file in _files(folder):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                tensor = opened.get_slice(name)
                if tensor.get_dtype() not in _SUPPORTED_DTYPES:
                    raise ConfigError(
                        f"{file}: {name} is stored as {tensor.get_dtype()}, but octavo reads only "
                        f"{', '.join(sorted(_SUPPORTED_DTYPES))}; use the unquantised model"
                    )
                if name in found:
                    raise ConfigError(
                        f"{folder}: {name} is in {found[name].file.name} and in {file.name}; "
                        f"keep only one model in the folder, with its {INDEX}"
                    )
                found[name] = StoredTensor(file, tuple(tensor.get_shape()), tensor.get_dtype())
    return found


def read_tensor(stored: StoredTensor, name: str) -> Tensor:
    """One tensor on the CPU, in its stored dtype."""
    with _open(stored.file) as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def row_blocks(stored: StoredTensor, name: str) -> Iterator[Tensor]:
    """One tensor in blocks of rows, so that it need not fit into memory."""
    with _open(stored.file) as opened:
        rows = opened.get_slice(name)
        for start in range(0, stored.shape[0] if stored.shape else 0, _ROWS):
            yield rows[start : start + _ROWS]


def _open(file: Path) -> Any:
    safetensors = import_safetensors()
    try:
        return safetensors.safe_open(check_regular(file), framework="pt", device="cpu")
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; download or export the model again") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"{file} is damaged or not a safetensors file ({error}); download or export the model again"
        ) from None


def _files(folder: Path) -> list[Path]:
    """The model's files: those in the index if there is one, else all."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{index}: not an index of safetensors files ({error}); download it again"
        ) from None
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", str(name)):
            raise ConfigError(f"{index}: {name!a} is not the name of a file in the folder; refused")
    return [folder / name for name in names]


def split_into_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Split tensors, in order, into files of at most `max_bytes`; a larger tensor gets its own file."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[str]],
    read: Callable[[str], Tensor],
    on_written: Callable[[Path], None] = lambda file: None,
) -> None:
    """Write one file per list of names in `shards`, and the index.

    `read` returns a tensor by name and is called in order; `on_written` is called with each synced file.
    """
    save_file = import_safetensors().torch.save_file
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = folder / (SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors")
        tensors = {name: read(name).contiguous() for name in names}
        file.touch()
        mode = file.stat().st_mode  # by the umask; the library creates files that only their owner can read
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(mode)
        sync(file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map |= dict.fromkeys(names, file.name)
        del tensors
        on_written(file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path` and sync the file."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", durable=True)


def parse_size(text: str) -> int:
    """The bytes of `5GB`, `500MB`, `2GiB` or a plain number; `ConfigError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[kMGT]i?B|B)", text.strip(), re.IGNORECASE)
    units = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
    size = 0
    if match:
        unit = match[2].lower()
        size = int(float(match[1]) * (1024 if "i" in unit else 1000) ** units[unit.rstrip("ib")])
    if size < 1:
        raise ConfigError(f"--shard_size {text}: expected a size such as 5GB, 500MB or 2GiB")
    return size
