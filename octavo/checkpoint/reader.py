"""Reads a checkpoint's tensors and state, and runs nothing that stands in it.

    read_state(folder)    the JSON state: step, tokens seen, the run's config, …
    read_model(folder)    the whole model on the CPU, by plain parameter names, on one process
    Reader(folder)        for `dcp.load(..., storage_reader=…)`: the shards that each rank needs

DCP's own reader unpickles the metadata, and its planner unpickles every entry that is not a tensor. Here the
metadata is read by `metadata.py`; a tensor by `torch.load(weights_only=True)`, which builds tensors and
refuses the rest; and an entry that is not a tensor is refused: octavo writes none.
"""

import io
import json
import pickle
import re
from pathlib import Path
from typing import IO, Any, cast

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

STATE = "state.json"
_KINDS = {
    "step": int,
    "tokens_seen": int,
    "world_size": int,
    "model_only": bool,
    "data": dict,
    "schedule": dict,
}
"""What a state holds, where it holds it."""


def read_state(folder: Path) -> dict[str, Any]:
    """What is not a tensor: "step", "tokens_seen", "config" (the job's `to_dict()`), and more.

    Raises `DamagedCheckpoint` if it is not there or is no JSON object.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: no JSON ({error})") from None
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{path}: no JSON object")
    for key, kind in _KINDS.items():
        if key in state and type(state[key]) is not kind:
            raise DamagedCheckpoint(f"{path}: {key} is {str(state[key])[:50]!r}, and no {kind.__name__}")
    return state


def read_model(folder: Path) -> dict[str, Tensor]:
    """The parameters and buffers, whole, on the CPU, by plain name; of a checkpoint of any layout.

    Raises:
        DamagedCheckpoint: it cannot be read.
        RefusedCheckpoint: it holds something else than tensors.
    """
    return read_tensors(folder, "model.")


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with `prefix`, without it; see `read_model`."""
    reader = Reader(folder)
    return {
        name.removeprefix(prefix): reader.whole(name)
        for name in reader.metadata.state_dict_metadata
        if name.startswith(prefix)
    }


def load_tensors(
    file: Path | IO[bytes], *, where: str = "", map_location: MAP_LOCATION = "cpu", mmap: bool = False
) -> Any:
    """What `torch.save` wrote, if it is tensors in plain containers.

    Raises:
        RefusedCheckpoint: it asks for anything else; the message names what.
        DamagedCheckpoint: it is missing, cut short, or no such file.
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
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {found[1]}" if found else str(error).strip().splitlines()[-1][:200]
        raise RefusedCheckpoint(f"{where}: refused, nothing of it was run: {why}") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{where}: {error.strerror or error}") from None
    except Exception as error:  # of any kind: the bytes are anyone's
        raise DamagedCheckpoint(
            f"{where}: cannot be read ({type(error).__name__}: {str(error)[:200]})"
        ) from None


class Reader(FileSystemReader):
    """DCP's reader of a folder, without its pickles. The metadata is read at once.

    Raises `DamagedCheckpoint` or `RefusedCheckpoint`; out of `dcp.load` they come within a
    `CheckpointException`.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder
        self.metadata = read_metadata(folder)
        self.storage_data = self.metadata.storage_data

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata that the constructor read."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy each wanted part of a tensor to where `planner` wants it."""
        files: dict[str, IO[bytes]] = {}
        try:
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    self._refuse_bytes(item.storage_index)
                part = narrow_tensor_by_index(
                    self._chunk(item.storage_index, files), item.storage_offsets, item.lengths
                )
                target = planner.resolve_tensor(item).detach()
                if target.size() != part.size():
                    raise DamagedCheckpoint(
                        f"{self.folder}: {item.storage_index.fqn} is {tuple(part.size())} in its file, "
                        f"and {tuple(target.size())} was expected"
                    )
                target.copy_(part)
                planner.commit_tensor(item, target)
        finally:
            for file in files.values():
                file.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def whole(self, name: str) -> Tensor:
        """One tensor put together from all its chunks, on the CPU."""
        entry = self.metadata.state_dict_metadata[name]
        if not isinstance(entry, TensorStorageMetadata):
            self._refuse_bytes(MetadataIndex(name))
        assert isinstance(entry, TensorStorageMetadata)
        if sum(chunk.sizes.numel() for chunk in entry.chunks) < entry.size.numel():
            raise DamagedCheckpoint(f"{self.folder}: {name}: parts of it are missing")
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        files: dict[str, IO[bytes]] = {}
        try:
            for chunk in entry.chunks:
                part = self._chunk(MetadataIndex(name, chunk.offsets), files)
                place = narrow_tensor_by_index(tensor, chunk.offsets, chunk.sizes)
                if part.shape != place.shape:
                    raise DamagedCheckpoint(f"{self.folder}: {name} is {tuple(part.shape)} in its file")
                place.copy_(part)
        finally:
            for file in files.values():
                file.close()
        return tensor

    def _chunk(self, index: MetadataIndex, files: dict[str, IO[bytes]]) -> Tensor:
        """A stored chunk; `files` keeps files open between calls."""
        place: _StorageInfo | None = self.storage_data.get(index)
        if place is None:
            raise DamagedCheckpoint(f"{self.folder}: {index.fqn}: no file holds its part at {index.offset}")
        where = f"{self.folder / place.relative_path}: {index.fqn}"
        try:
            if place.relative_path not in files:
                files[place.relative_path] = (self.folder / place.relative_path).open("rb")
            part = self._slice_file(files[place.relative_path], place)
        except OSError as error:
            raise DamagedCheckpoint(f"{where}: {error.strerror or error}") from None
        found = load_tensors(part, where=where)
        if not isinstance(found, Tensor):
            raise DamagedCheckpoint(f"{where}: a {type(found).__name__} and no tensor")
        return found

    def _refuse_bytes(self, index: MetadataIndex) -> None:
        """Say what an entry of pickled bytes would have called."""
        place: _StorageInfo | None = self.storage_data.get(index)
        why = "it is a pickle, and octavo saves tensors only"
        if place is not None:
            path = self.folder / place.relative_path
            with path.open("rb") as file:
                file.seek(place.offset)
                content = io.BytesIO(file.read(place.length))
            try:
                load_tensors(content, where=path.name)
            except DamagedCheckpoint as error:
                why = f"{why}; {error}"
        raise RefusedCheckpoint(f"{self.folder}: {index.fqn}: refused: {why}")
