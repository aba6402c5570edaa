"""What the ranks do together to load a checkpoint: verify it, open it, see whether it fits the model.

What one rank finds wrong is wrong for all of them, so that none goes on alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from octavo.checkpoint import manifest, rng
from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint
from octavo.checkpoint.hashing import differences
from octavo.checkpoint.reader import Reader, read_state
from octavo.checkpoint.saving import from_rank_0
from octavo.config import ConfigError


def problems_by_ranks(path: Path, step: int | None, group: dist.ProcessGroup) -> list[str]:
    """What is wrong with a checkpoint. Each rank reads its share of the files."""
    found: dict[str, Any] | str = ""
    if dist.get_rank() == 0:
        try:
            found = manifest.read(path, step)
        except DamagedCheckpoint as error:
            found = str(error)
    found = from_rank_0(found, group)
    if isinstance(found, str):
        return [found]
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = sorted(found["files"])[rank::world]
    wrong: list[Any] = [None] * world
    share = differences(path, {name: found["files"][name] for name in mine}, found["hash"])
    dist.all_gather_object(wrong, share, group=group)
    return [problem for share in wrong for problem in share]


@dataclass(frozen=True)
class Opened:
    """A checkpoint of which all but the shards is read. random: the generators' states of this rank."""

    reader: Reader
    state: dict[str, Any]
    random: dict[str, Tensor]


_OWN = ("step", "world_size", "model_only")  # of a state, what loading itself needs


def open_by_ranks(path: Path, group: dist.ProcessGroup, needs: Sequence[str] = ()) -> Opened:
    """What each rank reads by itself; an error on one rank is one on all. needs: what the state must hold."""
    opened, problem = None, None
    try:
        reader, state = Reader(path), read_state(path)
        if missing := sorted({*_OWN, *needs} - state.keys()):
            raise DamagedCheckpoint(f"{path}: state.json lacks {', '.join(missing)}")
        prefix = f"rng.{dist.get_rank()}."
        names = [name for name in reader.metadata.state_dict_metadata if name.startswith(prefix)]
        random = {name.removeprefix(prefix): reader.whole(name) for name in names}
        opened = Opened(reader, state, random)
    except DamagedCheckpoint as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=group)
    for problem in problems:
        if problem is not None:
            raise DamagedCheckpoint(problem)
    assert opened is not None
    return opened


def restore_rng(opened: Opened) -> dict[str, str]:
    """Set the generators as they were; why they are not, if they are not."""
    now, then = dist.get_world_size(), opened.state["world_size"]
    if now != then:
        return {"RNG": f"{then} processes then, {now} now"}
    missing = rng.restore(opened.random)
    return {"RNG": f"nothing was saved of {', '.join(missing)}"} if missing else {}


def check_fit(reader: Reader, model_state: dict[str, Any]) -> None:
    """`ConfigError` that names the first parameters which the checkpoint lacks or has in another shape."""
    saved = reader.metadata.state_dict_metadata
    wrong = []
    for name, tensor in model_state.items():
        found = saved.get(f"model.{name}")
        if found is None:
            wrong.append(f"{name} is not in it")
        elif isinstance(found, TensorStorageMetadata) and tuple(found.size) != tuple(tensor.shape):
            wrong.append(f"{name} is {tuple(found.size)} in it and {tuple(tensor.shape)} in the model")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"{reader.folder} does not fit this model: {'; '.join(wrong[:3])}{more}. "
            "Set model.flavor and model.hf_assets_path as they were, or checkpoint.folder to a new folder"
        )
