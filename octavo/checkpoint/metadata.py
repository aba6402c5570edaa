"""Reads DCP's `.metadata`, a pickle, without running code from it.

`pickle.load` calls whatever the file names. This unpickler accepts the dozen names that DCP writes and
refuses every other one before anything is called. Even those names do not resolve to the real classes,
because a pickle can set attributes of a class: they resolve to stand-ins that only store their arguments. The
real objects are built from the stand-ins afterwards, with the type of each field checked, and each file name
confined to the folder.
"""

import io
import pickle
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
from octavo.core.fs import open_to_read

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
        loaded = super().load()
        if self._unused is not None:
            raise self._refused(*self._unused)
        return loaded

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) == _GETATTR:
            self._unused = _GETATTR
            return self._enum_member
        if (module, name) not in _KNOWN:
            raise self._refused(module, name)
        return self._stand_ins.setdefault((module, name), _stand_in(name))

    def _enum_member(self, owner: Any, name: Any) -> Any:
        """Replaces getattr, with which Python before 3.11.4 pickles members of an enumeration."""
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


class _StandIn:
    """Takes the place of a class that a pickle names; keeps what it is given."""

    stands_for = ""

    def __new__(cls, *args: Any) -> Any:
        instance: Any = super().__new__(cls)
        instance.args, instance.state = args, {}
        return instance

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stand_in(name: str) -> type:
    return type(name, (_StandIn,), {"stands_for": name})


class _InvalidMetadata(Exception):
    """The pickle contains something that DCP does not write."""


def read_metadata(folder: Path) -> Metadata:
    """The metadata of the checkpoint in `folder`.

    Raises:
        RefusedCheckpoint: it names anything that DCP's metadata does not need.
        DamagedCheckpoint: it is missing, truncated, or not DCP's metadata.
    """
    path = folder / FILE
    try:
        with open_to_read(path) as file:
            return _metadata(_Unpickler(file, path).load())
    except RefusedCheckpoint:
        raise
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # arbitrary bytes can raise any type
        raise DamagedCheckpoint(f"{path}: not DCP's metadata ({type(error).__name__}: {error})") from None


def _stands_for(value: Any) -> str | None:
    return getattr(type(value), "stands_for", None)


def _fields(value: Any, name: str) -> dict[str, Any]:
    if _stands_for(value) != name or not isinstance(value.state, dict):
        raise _InvalidMetadata(f"expected a {name}, found a {type(value).__name__}")
    return value.state


def _typed(value: Any, expected: type, what: str) -> Any:
    if type(value) is not expected:
        raise _InvalidMetadata(f"{what} must be {expected.__name__}, not {type(value).__name__}")
    return value


def _size(value: Any) -> torch.Size:
    if _stands_for(value) != "Size" or len(value.args) != 1:
        raise _InvalidMetadata(f"expected a size, found a {type(value).__name__}")
    numbers = [_typed(number, int, "a size") for number in _typed(value.args[0], tuple, "a size")]
    if any(number < 0 for number in numbers):
        raise _InvalidMetadata(f"a size is negative: {numbers}")
    return torch.Size(numbers)


def _tensor(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _stands_for(value) == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata")
    properties = fields["properties"]
    if _stands_for(properties) != "TensorProperties":
        raise _InvalidMetadata("a tensor has no properties")
    dtype = _typed(_typed(properties.state, tuple, "properties")[0], torch.dtype, "a dtype")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in _typed(fields["chunks"], list, "chunks")]
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=_size(fields["size"]),
        chunks=[ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _storage_info(value: Any) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo")
    name = _typed(fields["relative_path"], str, "a file name")
    if not name or Path(name).name != name or "\0" in name or name == "..":
        raise _InvalidMetadata(f"{name!r} is not the name of a file in the folder")
    if fields.get("transform_descriptors"):
        raise _InvalidMetadata(f"{name} is transformed by {fields['transform_descriptors']!r}")
    offset, length = (_typed(fields[key], int, key) for key in ("offset", "length"))
    if offset < 0 or length < 0:
        raise _InvalidMetadata(f"{name}: offset {offset}, length {length}")
    return _StorageInfo(name, offset, length)


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex")
    offset, number = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _typed(fields["fqn"], str, "a name"),
        None if offset is None else _size(offset),
        None if number is None else _typed(number, int, "a chunk's number"),
    )


def _key_path(value: Any) -> tuple[str | int, ...]:
    """The keys that lead to an entry in the saved nested dict."""
    for key in _typed(value, tuple, "a key path"):
        if type(key) not in (str, int):
            raise _InvalidMetadata(f"a key is a {type(key).__name__}")
    return value


def _metadata(loaded: Any) -> Metadata:
    fields = _fields(loaded, "Metadata")
    entries, key_paths, places = (
        _typed(fields[key], dict, key) for key in ("state_dict_metadata", "planner_data", "storage_data")
    )
    return Metadata(
        state_dict_metadata={_typed(name, str, "a name"): _tensor(entry) for name, entry in entries.items()},
        planner_data={_typed(name, str, "a name"): _key_path(keys) for name, keys in key_paths.items()},
        storage_data={_index(key): _storage_info(place) for key, place in places.items()},
        storage_meta=StorageMeta(),
    )
