"""A training run's first and last word with other formats: weights that it starts from, and its final export.

Both go parameter by parameter. At the start every process reads a whole parameter from the disk and keeps its
shard; at the end the processes gather one parameter at a time, and the first writes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from octavo import models
from octavo.checkpoint.reader import read_state
from octavo.checkpoint.store import published_steps
from octavo.config import ConfigError
from octavo.config.schema import Checkpoint, Model
from octavo.core.logging import logger
from octavo.hf import safetensors_folder
from octavo.hf.folder_writer import DTYPES, HfLayout, write_folder
from octavo.hf.model_sources import (
    build,
    checkpoint_weights,
    differences,
    find_checkpoint,
    hf_model,
    hf_weights,
)
from octavo.hf.stored_weights import Weights, check_fit, shapes_of
from octavo.models.init import plain_name
from octavo.tokenizer import Tokenizer

_SHARD_BYTES = 2 * 10**9  # the other processes wait while one file is written
_REMEDY = "Set model.flavor, and model.hf_assets_path, to that model's own"


@dataclass(frozen=True)
class Initial:
    """Weights to start from, found to fit the model; and the folder that they are in."""

    folder: Path
    weights: Weights

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Replace the weights of `model`, sharded or not."""
        for name, parameter in model.named_parameters():
            whole = self.weights.read(plain_name(name)).to(device=parameter.device, dtype=parameter.dtype)
            if isinstance(parameter, DTensor):
                # src_data_rank=None: every process has read the same values, so nothing needs to be sent
                mesh, placements = parameter.device_mesh, parameter.placements
                whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            parameter.copy_(whole)
        logger.info("Training starts from the weights in %s", self.folder)


def open_initial(settings: Checkpoint, checkpoints: Path, which: Model, args: Any) -> Initial | None:
    """The weights that `settings.initial_load_path` names; None where it is unset, or where the run has
    checkpoints of its own in the folder `checkpoints`, from which it resumes. Called by every process.

    `which` and `args` are the run's model. Only shapes are read yet, so that a misfit is told before anything
    large is built.

    Raises:
        ConfigError: the weights are missing, damaged, or of another model.
    """
    if settings.initial_load_path is None:
        return None
    path = Path(settings.initial_load_path).expanduser()
    folder = _decide(lambda: _find(path, settings, checkpoints))
    if folder is None:
        return None
    spec, flavor = models.get(which.name), which.flavor
    model = f"{spec.name} {flavor}"
    if settings.initial_load_in_hf:
        found_spec, found = hf_model(folder)
        wrong = [] if found_spec is spec else [f"it is a {found_spec.name}"]
        if wrong := wrong or differences(found, args):
            raise ConfigError(f"{folder} is not {model}: {'; '.join(wrong)}. {_REMEDY}")
        return Initial(folder, hf_weights(folder, spec, args, model=model, remedy=_REMEDY))
    weights = checkpoint_weights(folder)
    expected = shapes_of(build(spec, args))
    check_fit(weights.shapes, expected, where=str(folder), model=model, remedy=_REMEDY)
    theirs = read_state(folder).get("config", {}).get("model", {}).get("flavor", flavor)
    if theirs != flavor:
        logger.warning("%s is of flavor %s, and fits %s: only its weights are taken", folder, theirs, flavor)
    return Initial(folder, weights)


def _find(path: Path, settings: Checkpoint, checkpoints: Path) -> Path | None:
    if settings.enable and published_steps(checkpoints):
        return None
    return path if settings.initial_load_in_hf else find_checkpoint(path)


def _decide(choose: Callable[[], Path | None]) -> Path | None:
    """What `choose` returns or raises on the first process, which alone calls it: it may read every file."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [choose()]
        except ConfigError as error:
            box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], ConfigError):
        raise box[0]
    chosen: Path | None = box[0]
    return chosen


def export_folder(checkpoints: Path, step: int) -> Path:
    """Where the final export of a run of `step` steps goes."""
    return checkpoints / f"step-{step}-hf"


def check_exportable(spec: models.ModelSpec) -> None:
    """`ConfigError` unless models of `spec` can be exported: better before the training than after it."""
    safetensors_folder.library()
    if spec.hugging_face is None:
        raise ConfigError(
            f"checkpoint.last_save_in_hf = true: the model {spec.name} has no form in transformers; "
            "leave it out"
        )


def save_final(
    model: nn.Module,
    out: Path,
    dtype: str,
    spec: models.ModelSpec,
    args: Any,
    tokenizer: Tokenizer,
    *,
    pipeline: DeviceMesh | None = None,
) -> None:
    """Export `model`, sharded or not, into the folder `out`, in `dtype`; called by every process.

    `pipeline`: the processes that have the other stages of the model.
    """
    state: dict[str, Any] = get_model_state_dict(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    weights = Weights("the model", shapes, lambda name: _whole(state[name]))
    if pipeline is not None:
        weights = _of_all_stages(weights, pipeline)
    layout = HfLayout(spec, args, weights, DTYPES[dtype], _SHARD_BYTES)
    if dist.get_rank() == 0:
        write_folder(out, layout, tokenizer)
        logger.info("Exported the model, in Hugging Face's format, to %s", out)
    else:
        for names in layout.plan:
            for name in names:
                layout.read(name)  # takes part in the gathering
    dist.barrier()


def _of_all_stages(mine: Weights, pipeline: DeviceMesh) -> Weights:
    """The weights of every stage; each is read by all processes at the same time, from the one that has
    it.
    """
    group = pipeline.get_group()
    told: list[Any] = [None] * pipeline.size()
    dist.all_gather_object(told, dict(mine.shapes), group=group)
    owner = {name: rank for rank, shapes in enumerate(told) for name in shapes}

    def read(name: str) -> Tensor:
        rank = owner[name]
        here = rank == pipeline.get_local_rank()
        whole = mine.read(name).float().contiguous() if here else torch.empty(told[rank][name])
        dist.broadcast(whole, group=group, group_src=rank)
        return whole

    return Weights(mine.where, {name: told[rank][name] for name, rank in owner.items()}, read)


def _whole(tensor: Any) -> Tensor:
    """A parameter as one tensor on the CPU."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to(tensor.device_mesh.device_type)  # parameters that are offloaded are gathered there
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    whole: Tensor = tensor.detach().cpu()
    return whole
