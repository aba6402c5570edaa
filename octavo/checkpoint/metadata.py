"""DCP's `.metadata`, read without running what it says.

The file is a pickle, and a pickle is a program: `pickle.load` calls whatever it names. Here an unpickler
knows the dozen names that DCP writes and refuses every other one by name, before anything is called. The
names it knows do not give the real classes either, for a pickle can also set attributes of a class that it is
given: they give stand-ins made for this one reading, which hold what they are given and do nothing. The real
objects are then built from those, each field checked for its type, each file name for staying in the folder.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint, RefusedCheckpoint

FILE = ".metadata"

_DCP = "torch.distributed.checkpoint.metadata"
_ENUMERATION = "_MEM_FORMAT_ENCODING"
_GETATTR = ("builtins", "getattr")
_KNOWN = {
    *((_DCP, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_DCP, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    (_DCP, _ENUMERATION),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedIOBase, where: Path):
        super().__init__(file)
        self._where = where
        self._stand_ins: dict[tuple[str, str], type] = {}
        self._unused: tuple[str, str] | None = None

    def load(self) -> Any:
        found = super().load()
        if self._unused is not None:
            raise self._refused(*self._unused)
        return found

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) == _GETATTR:
            self._unused = _GETATTR
            return self._member
        if (module, name) not in _KNOWN:
            raise self._refused(module, name)
        return self._stand_ins.setdefault((module, name), _stand_in(name))

    def _member(self, owner: Any, name: Any) -> Any:
        """In place of getattr, by which Python before 3.11.4 pickles a member of an enumeration."""
        if getattr(owner, "stands_for", None) != _ENUMERATION:
            raise self._refused(*_GETATTR)
        self._unused = None
        return owner(name)

    def _refused(self, module: str, name: str) -> RefusedCheckpoint:
        return RefusedCheckpoint(
            f"{self._where}: refused: it asks for {module}.{name}, which no checkpoint needs; "
            "nothing of it was run. Do not use this checkpoint"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedCheckpoint(f"{self._where}: refused: it asks for a persistent object, {pid!r}")


def _stand_in(name: str) -> type:
    def init(self: Any, *args: Any) -> None:
        self.args, self.state = args, {}

    def new(cls: type, *args: Any) -> Any:
        made: Any = object.__new__(cls)
        init(made, *args)
        return made

    def set_state(self: Any, state: Any) -> None:
        self.state = state

    members = {"__new__": new, "__init__": init, "__setstate__": set_state, "stands_for": name}
    return type(name, (), members)


class _Wrong(Exception):
    """The pickle holds something else than DCP writes."""


def read_metadata(folder: Path) -> Metadata:
    """The metadata of the checkpoint in `folder`.

    Raises:
        RefusedCheckpoint: it names anything that DCP's metadata has no need of.
        DamagedCheckpoint: it is missing, cut short, or no metadata.
    """
    path = folder / FILE
    try:
        with path.open("rb") as file:
            found = _Unpickler(file, path).load()
        return _metadata(found)
    except RefusedCheckpoint:
        raise
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # of any kind: the bytes are anyone's
        raise DamagedCheckpoint(f"{path}: no metadata of DCP ({type(error).__name__}: {error})") from None


def _state(value: Any, name: str) -> dict[str, Any]:
    if getattr(type(value), "stands_for", None) != name or not isinstance(value.state, dict):
        raise _Wrong(f"a {name} was expected, and there is a {type(value).__name__}")
    return value.state


def _of(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise _Wrong(f"{what} must be {kind.__name__}, and is {type(value).__name__}")
    return value


def _size(value: Any) -> torch.Size:
    if getattr(type(value), "stands_for", None) != "Size" or len(value.args) != 1:
        raise _Wrong(f"a size was expected, and there is a {type(value).__name__}")
    numbers = [_of(number, int, "a size") for number in _of(value.args[0], tuple, "a size")]
    if any(number < 0 for number in numbers):
        raise _Wrong(f"a size is negative: {numbers}")
    return torch.Size(numbers)


def _tensor(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if getattr(type(value), "stands_for", None) == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _state(value, "TensorStorageMetadata")
    properties = fields["properties"]
    if getattr(type(properties), "stands_for", None) != "TensorProperties":
        raise _Wrong("a tensor has no properties")
    dtype = _of(_of(properties.state, tuple, "properties")[0], torch.dtype, "a dtype")
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in _of(fields["chunks"], list, "chunks")]
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=_size(fields["size"]),
        chunks=[ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _place(value: Any) -> _StorageInfo:
    fields = _state(value, "_StorageInfo")
    name = _of(fields["relative_path"], str, "a file name")
    if not name or Path(name).name != name or "\0" in name or name == "..":
        raise _Wrong(f"{name!r} is not the name of a file in the folder")
    if fields.get("transform_descriptors"):
        raise _Wrong(f"{name} is transformed by {fields['transform_descriptors']!r}")
    offset, length = (_of(fields[key], int, key) for key in ("offset", "length"))
    if offset < 0 or length < 0:
        raise _Wrong(f"{name}: offset {offset}, length {length}")
    return _StorageInfo(name, offset, length)


def _index(value: Any) -> MetadataIndex:
    fields = _state(value, "MetadataIndex")
    offset, number = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _of(fields["fqn"], str, "a name"),
        None if offset is None else _size(offset),
        None if number is None else _of(number, int, "a chunk's number"),
    )


def _way(value: Any) -> tuple[str | int, ...]:
    """The keys that lead to an entry in the nested dict that was saved."""
    for key in _of(value, tuple, "a way"):
        if type(key) not in (str, int):
            raise _Wrong(f"a key is a {type(key).__name__}")
    return value


def _dict(value: Any, what: str) -> Mapping[Any, Any]:
    return _of(value, dict, what)


def _metadata(found: Any) -> Metadata:
    fields = _state(found, "Metadata")
    return Metadata(
        state_dict_metadata={
            _of(name, str, "a name"): _tensor(entry)
            for name, entry in _dict(fields["state_dict_metadata"], "the entries").items()
        },
        planner_data={
            _of(name, str, "a name"): _way(way)
            for name, way in _dict(fields["planner_data"], "the ways").items()
        },
        storage_data={
            _index(key): _place(place) for key, place in _dict(fields["storage_data"], "the places").items()
        },
        storage_meta=StorageMeta(),
    )
