"""Initial weights of a training run from another checkpoint or format, and its final export.

Both handle one parameter at a time. At the start every process reads an unsharded parameter from disk and
keeps its shard; at the end the processes gather one parameter, and rank 0 writes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from octavo import models
from octavo.checkpoint.reader import STATE, read_state
from octavo.checkpoint.store import published_steps
from octavo.config import ConfigError
from octavo.config.schema import Checkpoint, Model
from octavo.core.logging import logger
from octavo.hf import safetensors_folder
from octavo.hf.folder_writer import DTYPES, ExportPlan, save_pretrained
from octavo.hf.model_sources import (
    build_on_meta,
    compare_args,
    find_checkpoint,
    open_checkpoint_weights,
    open_hf_weights,
    read_hf_config,
)
from octavo.hf.stored_weights import Weights, check_fit, saved_tensors, shapes_of
from octavo.hf.torchtitan_checkpoint import is_torchtitan_checkpoint, open_torchtitan_weights
from octavo.tokenizer import Tokenizer

_SHARD_BYTES = 2 * 10**9  # the other processes wait while one file is written
_REMEDY = "Set model.flavor and model.hf_assets_path to those of that model"


@dataclass(frozen=True)
class InitialWeights:
    """Initial weights that fit the model, and their folder."""

    folder: Path
    weights: Weights

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Copy the weights into `model`, sharded or not."""
        for name, parameter in saved_tensors(model):
            value = self.weights.read(name).to(device=parameter.device, dtype=parameter.dtype)
            if isinstance(parameter, DTensor):
                # src_data_rank=None: every process has read the same values, so nothing is sent.
                mesh, placements = parameter.device_mesh, parameter.placements
                value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            parameter.copy_(value)
        logger.info("Training starts from the weights in %s", self.folder)


def open_initial_weights(
    settings: Checkpoint, checkpoints: Path, which: Model, args: Any
) -> InitialWeights | None:
    """The weights in `settings.initial_load_path`; a collective call.

    None if it is unset, or if the run resumes from checkpoints in its own folder `checkpoints`. `which` and
    `args` are the run's model. Only shapes are read yet, so a mismatch is reported before anything large is
    built.

    Raises:
        ConfigError: the weights are missing, damaged, or of another model.
    """
    if settings.initial_load_path is None:
        return None
    path = Path(settings.initial_load_path).expanduser()
    folder = _call_on_rank_0(lambda: _find_folder(path, settings, checkpoints))
    if folder is None:
        return None
    spec, flavor = models.get(which.name), which.flavor
    model = f"{spec.name} {flavor}"
    if settings.initial_load_in_hf:
        found_spec, found = read_hf_config(folder)
        problems = compare_args(found, args) if found_spec is spec else [f"it is a {found_spec.name}"]
        if problems:
            raise ConfigError(f"{folder} is not {model}: {'; '.join(problems)}. {_REMEDY}")
        return InitialWeights(folder, open_hf_weights(folder, spec, args, model=model, remedy=_REMEDY))
    from_torchtitan = is_torchtitan_checkpoint(folder)
    if from_torchtitan and not (spec.name == "llama3" and settings.initial_load_model_only):
        raise ConfigError(
            f"{folder} is a DCP folder without octavo's {STATE}, as torchtitan's are; only llama3's "
            "weights can be loaded: set model.name = llama3 and checkpoint.initial_load_model_only = true"
        )
    weights = open_torchtitan_weights(folder, args) if from_torchtitan else open_checkpoint_weights(folder)
    expected = shapes_of(build_on_meta(spec, args))
    check_fit(weights.shapes, expected, where=str(folder), model=model, remedy=_REMEDY)
    if from_torchtitan:
        return InitialWeights(folder, weights)
    saved_flavor = read_state(folder).get("config", {}).get("model", {}).get("flavor", flavor)
    if saved_flavor != flavor:
        logger.warning(
            "%s has flavor %s but fits %s: only its weights are used", folder, saved_flavor, flavor
        )
    return InitialWeights(folder, weights)


def _find_folder(path: Path, settings: Checkpoint, checkpoints: Path) -> Path | None:
    if settings.enable and published_steps(checkpoints):
        return None
    as_named = settings.initial_load_in_hf or is_torchtitan_checkpoint(path)
    return path if as_named else find_checkpoint(path)


def _call_on_rank_0(find: Callable[[], Path | None]) -> Path | None:
    """Call `find`, which may read every file, on rank 0 only; its result or `ConfigError` on every rank."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [find()]
        except ConfigError as error:
            box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], ConfigError):
        raise box[0]
    found: Path | None = box[0]
    return found


def require_exportable(spec: models.ModelSpec) -> None:
    """`ConfigError` unless models of `spec` can be exported; called before training starts."""
    safetensors_folder.import_safetensors()
    if spec.hugging_face is None:
        raise ConfigError(
            f"checkpoint.last_save_in_hf = true: the model {spec.name} cannot be exported, because its "
            "ModelSpec has no hugging_face; remove the option"
        )


def export_final(
    model: nn.Module,
    checkpoints: Path,
    step: int,
    dtype: str,
    spec: models.ModelSpec,
    args: Any,
    tokenizer: Tokenizer,
    *,
    pipeline: DeviceMesh | None = None,
) -> None:
    """Export `model` after `step`, its last, to a folder beside its `checkpoints`, unless that is done; a
    collective call.

    `pipeline`: the mesh of the model's other pipeline stages.
    """
    out = checkpoints / f"step-{step}-hf"
    done = [out.exists()]
    dist.broadcast_object_list(done)  # rank 0 writes; the others may not see its disk
    if done[0]:
        return
    state: dict[str, Any] = get_model_state_dict(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    weights = Weights("the model", shapes, lambda name: _full_tensor(state[name]))
    if pipeline is not None:
        weights = _join_stages(weights, pipeline)
    plan = ExportPlan(spec, args, weights, DTYPES[dtype], _SHARD_BYTES)
    if dist.get_rank() == 0:
        save_pretrained(out, plan, tokenizer)
        logger.info("Exported the model, in Hugging Face's format, to %s", out)
    else:
        for name in chain.from_iterable(plan.shards):
            plan.read(name)  # a collective call
    dist.barrier()


def _join_stages(local: Weights, pipeline: DeviceMesh) -> Weights:
    """The weights of all stages. `read` is a collective call: the stage that has the tensor broadcasts it."""
    group = pipeline.get_group()
    shapes: list[Any] = [None] * pipeline.size()
    dist.all_gather_object(shapes, dict(local.shapes), group=group)
    owner = {name: rank for rank, of_stage in enumerate(shapes) for name in of_stage}

    def read(name: str) -> Tensor:
        rank = owner[name]
        is_local = rank == pipeline.get_local_rank()
        tensor = local.read(name).float().contiguous() if is_local else torch.empty(shapes[rank][name])
        dist.broadcast(tensor, group=group, group_src=rank)
        return tensor

    return Weights(local.where, {name: shapes[rank][name] for name, rank in owner.items()}, read)


def _full_tensor(tensor: Any) -> Tensor:
    """An unsharded copy of a parameter on the CPU."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to(tensor.device_mesh.device_type)  # offloaded parameters are gathered on the device
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    full: Tensor = tensor.detach().cpu()
    return full
