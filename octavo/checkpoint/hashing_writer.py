"""DCP's writer into a new folder, hashing each file while it is written.

DCP writes one file a rank and, on rank 0, `.metadata`; it syncs each of them. `contents` then says what this
rank wrote.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from octavo.checkpoint import failpoints
from octavo.checkpoint.hashing import Content, HashingFile


class _HashingFileSystem(FileSystem):
    def __init__(self, algorithm: str):
        self.contents: dict[str, Content] = {}
        self._algorithm = algorithm

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        assert mode == "wb", mode
        with HashingFile(Path(path), self._algorithm) as stream:
            failpoints.reach("during write")
            try:
                yield cast(Any, stream)
            except Exception as error:  # torch's writer says of a full disk that it is at an unexpected place
                raise stream.error or error from None
        self.contents[Path(path).name] = stream.content()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.contents[Path(new_path).name] = self.contents.pop(Path(path).name)


@contextmanager
def _without_zip_checksums() -> Iterator[None]:
    """torch.save would checksum each tensor for zip tools, slowly; torch.load never looks at it."""
    wanted = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(wanted)


class HashingWriter(FileSystemWriter):
    """Writes into `folder`, which is there and empty; `algorithm` is one of `hashing.ALGORITHMS`."""

    def __init__(self, folder: Path, algorithm: str):
        super().__init__(folder)
        self.fs = self._files = _HashingFileSystem(algorithm)

    @property
    def contents(self) -> dict[str, Content]:
        """This process's files by name."""
        return self._files.contents

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors and sync them."""
        with _without_zip_checksums():
            done = super().write_data(plan, planner)
        failpoints.reach("after shard")
        return done
