"""Steps of loading that all ranks do together: verify a checkpoint, open it, check that it fits the model.

An error on one rank is raised on all, so that none continues alone.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from octavo.checkpoint import manifest, rng
from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint
from octavo.checkpoint.reader import CheckpointReader, compare_shapes, read_state
from octavo.checkpoint.saving import broadcast_from_rank_0
from octavo.checkpoint.store import summarize
from octavo.config import ConfigError


def verify_by_ranks(path: Path, step: int | None, group: dist.ProcessGroup) -> list[str]:
    """The problems of a checkpoint, on every rank. Each rank reads its share of the files."""
    fields: dict[str, Any] | str = ""
    if dist.get_rank() == 0:
        try:
            fields = manifest.read(path, step)
        except DamagedCheckpoint as error:
            fields = str(error)
    fields = broadcast_from_rank_0(fields, group)
    if isinstance(fields, str):
        return [fields]
    rank, world = dist.get_rank(), dist.get_world_size()
    own_files = {name: fields["files"][name] for name in sorted(fields["files"])[rank::world]}
    problems: list[Any] = [None] * world
    dist.all_gather_object(problems, manifest.verify_files(path, own_files, fields["hash"]), group=group)
    return [problem for of_rank in problems for problem in of_rank]


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint before its shards are loaded. rng_states: of this rank's generators."""

    reader: CheckpointReader
    state: dict[str, Any]
    rng_states: dict[str, Tensor]


_REQUIRED = ("step", "world_size", "model_only")  # fields of the state that loading itself reads


def open_by_ranks(path: Path, group: dist.ProcessGroup, needs: Sequence[str] = ()) -> OpenedCheckpoint:
    """Read everything but the shards. `needs`: fields that the state must have, besides those of loading.

    Raises `DamagedCheckpoint` on all ranks if one rank cannot read it.
    """
    opened, problem = None, None
    try:
        reader, state = CheckpointReader(path), read_state(path)
        if missing := sorted({*_REQUIRED, *needs} - state.keys()):
            raise DamagedCheckpoint(f"{path}: state.json lacks {', '.join(missing)}")
        named = manifest.read(path).get("config_sha256")
        if named is not None and named != manifest.config_hash(state.get("config", {})):
            raise DamagedCheckpoint(f"{path}: the configuration in state.json is not that of {manifest.FILE}")
        prefix = f"rng.{dist.get_rank()}."
        names = [name for name in reader.metadata.state_dict_metadata if name.startswith(prefix)]
        rng_states = {name.removeprefix(prefix): reader.read_tensor(name) for name in names}
        opened = OpenedCheckpoint(reader, state, rng_states)
    except DamagedCheckpoint as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=group)
    for problem in problems:
        if problem is not None:
            raise DamagedCheckpoint(problem)
    assert opened is not None
    return opened


def restore_rng(opened: OpenedCheckpoint) -> dict[str, str]:
    """Restore this rank's generators; returns {"RNG": reason} if that is not possible."""
    now, saved = dist.get_world_size(), opened.state["world_size"]
    if now != saved:
        return {"RNG": f"{saved} processes then, {now} now"}
    missing = rng.restore(opened.rng_states)
    return {"RNG": f"not saved: {', '.join(missing)}"} if missing else {}


def check_fit(reader: CheckpointReader, model_state: Mapping[str, Any]) -> None:
    """`ConfigError` if the checkpoint lacks parameters of `model_state` or has them in other shapes."""
    saved = reader.metadata.state_dict_metadata
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model_state.items()
        if not isinstance(saved.get(f"model.{name}"), BytesStorageMetadata)  # the reader refuses these
    }
    if problems := compare_shapes(reader.model_shapes(), expected, "the model"):
        raise ConfigError(
            f"{reader.folder} does not fit this model: {summarize(problems)}. Set model.flavor and "
            "model.hf_assets_path as they were, or checkpoint.folder to a new folder"
        )


def exclude_parts(state: Mapping[str, Any], excluded: Set[str]) -> dict[str, Any]:
    """`state` without the parts in `checkpoint.exclude_from_loading`, which "not_exact" then lists.

    Without train_state the run starts at step 0; without dataloader, at the start of the data.
    """
    kept = {**state, "not_exact": {**state["not_exact"], **dict.fromkeys(sorted(excluded), "excluded")}}
    if "dataloader" in excluded:
        del kept["data"]
    if "train_state" in excluded:
        kept |= {"step": 0, "tokens_seen": 0}
        kept.pop("guard", None)
    return kept


def resume_message(step: int, tokens: int, not_exact: Mapping[str, str | None]) -> str:
    """The log line of a resumed run; `not_exact`: part -> why it differs from the saved one, or None."""
    parts = {"data position": None, "RNG": None, **not_exact}
    words = [f"{part} not exact ({why})" if why else f"{part} exact" for part, why in parts.items()]
    return f"resumed step {step}, tokens {tokens}, {', '.join(words)}"
