"""Reads a checkpoint's tensors and state without running code from it.

    read_state(folder)          the JSON state: step, tokens seen, the run's config, …
    read_model(folder)          the unsharded model on the CPU, by plain parameter names, in one process
    CheckpointReader(folder)    for `dcp.load(..., storage_reader=…)`: the shards that each rank needs

DCP's own reader unpickles the metadata, and its planner unpickles every entry that is not a tensor. Here
`metadata.py` reads the metadata; `torch.load(weights_only=True)`, which builds only tensors, reads tensors;
any other entry is refused, because octavo writes none.
"""

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future
from torch.serialization import MAP_LOCATION

from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint, RefusedCheckpoint
from octavo.checkpoint.metadata import read_metadata
from octavo.core.fs import open_to_read, read_json_object

STATE = "state.json"
Shape = tuple[int, ...]
_STATE_TYPES = {
    "step": int,
    "tokens_seen": int,
    "world_size": int,
    "model_only": bool,
    "data": dict,
    "schedule": dict,
}
"""The types of fields of the state; a state may lack any of them."""
_VALUES = {int: "an integer from 0 to 2^63 - 1", bool: "true or false", dict: "an object"}


def read_state(folder: Path) -> dict[str, Any]:
    """Everything but the tensors: "step", "tokens_seen", "config" (the job's `to_dict()`), and more.

    Raises `DamagedCheckpoint` if it is missing or not a JSON object.
    """
    path = folder / STATE
    try:
        state = read_json_object(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{path}: not JSON ({error})") from None
    for key, expected in _STATE_TYPES.items():
        value: Any = state.get(key, expected())
        in_range = not isinstance(value, int) or 0 <= value < 2**63
        if type(value) is not expected or not in_range:
            raise DamagedCheckpoint(f"{path}: {key} is {ascii(value)[:50]}, not {_VALUES[expected]}")
    return state


def read_model(folder: Path) -> dict[str, Tensor]:
    """The unsharded parameters and buffers on the CPU, by plain name, of a checkpoint of any layout.

    Raises:
        DamagedCheckpoint: it cannot be read.
        RefusedCheckpoint: it contains something other than tensors.
    """
    return read_tensors(folder, "model.")


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with `prefix`, by name without it; see `read_model`."""
    reader = CheckpointReader(folder)
    return {
        name.removeprefix(prefix): reader.read_tensor(name)
        for name in reader.metadata.state_dict_metadata
        if name.startswith(prefix)
    }


def load_tensors(
    file: Path | IO[bytes], *, where: str = "", map_location: MAP_LOCATION = "cpu", mmap: bool = False
) -> Any:
    """Load a file of `torch.save` that contains only tensors in plain containers.

    Raises:
        RefusedCheckpoint: it needs anything else; the message names it.
        DamagedCheckpoint: it is missing, truncated, or not such a file.
    """
    where = where or str(file)
    try:
        return torch.load(
            cast(Any, file),
            map_location=map_location,
            weights_only=True,
            mmap=mmap and isinstance(file, Path),
        )
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {needed[1]}" if needed else str(error).strip().splitlines()[-1][:200]
        raise RefusedCheckpoint(f"{where}: refused, nothing of it was run: {reason}") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{where}: {error.strerror or error}") from None
    except Exception as error:  # arbitrary bytes can raise any type
        raise DamagedCheckpoint(
            f"{where}: cannot be read ({type(error).__name__}: {str(error)[:200]})"
        ) from None


def compare_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], model: str) -> list[str]:
    """The `expected` parameters of `model` that are missing in `found` or have another shape there."""
    missing = [f"{name} is not in it" for name in expected if name not in found]
    return missing + [
        f"{name} is {found[name]} in it and {shape} in {model}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]


class CheckpointReader(FileSystemReader):
    """DCP's reader of a folder, without unpickling. The constructor reads the metadata.

    Raises `DamagedCheckpoint` or `RefusedCheckpoint`, which `dcp.load` wraps in a `CheckpointException`.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder
        self.metadata = read_metadata(folder)
        self.storage_data = self.metadata.storage_data

    def model_shapes(self) -> dict[str, Shape]:
        """The shapes of the model's unsharded parameters and buffers, by plain name."""
        return {
            name.removeprefix("model."): tuple(entry.size)
            for name, entry in self.metadata.state_dict_metadata.items()
            if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the parts of tensors in `plan` into the planner's tensors."""
        files: dict[str, IO[bytes]] = {}
        try:
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    self._refuse_bytes(item.storage_index)
                part = narrow_tensor_by_index(
                    self._read_chunk(item.storage_index, files), item.storage_offsets, item.lengths
                )
                target = planner.resolve_tensor(item).detach()
                if target.size() != part.size():
                    raise DamagedCheckpoint(
                        f"{self.folder}: {item.storage_index.fqn} is {tuple(part.size())} in its file, "
                        f"expected {tuple(target.size())}"
                    )
                target.copy_(part)
                planner.commit_tensor(item, target)
        finally:
            for file in files.values():
                file.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_tensor(self, name: str) -> Tensor:
        """One unsharded tensor, assembled from its chunks, on the CPU."""
        entry = self.metadata.state_dict_metadata[name]
        if not isinstance(entry, TensorStorageMetadata):
            self._refuse_bytes(MetadataIndex(name))
        if sum(chunk.sizes.numel() for chunk in entry.chunks) < entry.size.numel():
            raise DamagedCheckpoint(f"{self.folder}: {name}: chunks are missing")
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        files: dict[str, IO[bytes]] = {}
        try:
            for chunk in entry.chunks:
                stored = self._read_chunk(MetadataIndex(name, chunk.offsets), files)
                target = narrow_tensor_by_index(tensor, chunk.offsets, chunk.sizes)
                if stored.shape != target.shape:
                    raise DamagedCheckpoint(f"{self.folder}: {name} is {tuple(stored.shape)} in its file")
                target.copy_(stored)
        finally:
            for file in files.values():
                file.close()
        return tensor

    def _read_chunk(self, index: MetadataIndex, files: dict[str, IO[bytes]]) -> Tensor:
        """One stored chunk; `files` caches open files between calls."""
        place: _StorageInfo | None = self.storage_data.get(index)
        if place is None:
            raise DamagedCheckpoint(f"{self.folder}: {index.fqn}: no file has the chunk at {index.offset}")
        where = f"{self.folder / place.relative_path}: {index.fqn}"
        try:
            if place.relative_path not in files:
                files[place.relative_path] = open_to_read(self.folder / place.relative_path)
            part = self._slice_file(files[place.relative_path], place)
        except OSError as error:
            raise DamagedCheckpoint(f"{where}: {error.strerror or error}") from None
        tensor = load_tensors(part, where=where)
        if not isinstance(tensor, Tensor):
            raise DamagedCheckpoint(f"{where}: a {type(tensor).__name__}, not a tensor")
        return tensor

    def _refuse_bytes(self, index: MetadataIndex) -> NoReturn:
        """Raise `RefusedCheckpoint` for an entry of pickled bytes; names what it would have called."""
        place: _StorageInfo | None = self.storage_data.get(index)
        reason = "it is a pickle, and octavo saves tensors only"
        if place is not None:
            path = self.folder / place.relative_path
            with open_to_read(path) as file:
                file.seek(place.offset)
                content = io.BytesIO(file.read(place.length))
            try:
                load_tensors(content, where=path.name)
            except DamagedCheckpoint as error:
                reason = f"{reason}; {error}"
        raise RefusedCheckpoint(f"{self.folder}: {index.fqn}: refused: {reason}")
