"""A training run's first and last word with other formats: weights that it starts from, and its final export.

Both go parameter by parameter. At the start every process reads a whole parameter from the disk and keeps its
shard; at the end the processes gather one parameter at a time, and the first writes it.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from octavo import models
from octavo.checkpoint.reader import read_state
from octavo.components.init import plain_name
from octavo.components.logging import logger
from octavo.components.tokenizer import Tokenizer
from octavo.config import ConfigError
from octavo.hf import files
from octavo.hf.sources import checkpoint_weights, differences, find_checkpoint, hf_model, hf_weights
from octavo.hf.weights import Weights, check_fit, shapes_of
from octavo.hf.writer import DTYPES, HfLayout, write_folder

_SHARD_BYTES = 2 * 10**9  # the other processes wait while one file is written
_REMEDY = "Set model.flavor, and model.hf_assets_path, to that model's own"


def initial_weights(
    path: Path, in_hf: bool, spec: models.ModelSpec, args: Any, flavor: str
) -> tuple[Path, Weights]:
    """The weights in `path`, found to fit the model of `args`, and the folder that they are in.

    Raises:
        ConfigError: they are missing, damaged, or of another model.
    """
    model = f"{spec.name} {flavor}"
    if in_hf:
        found_spec, found = hf_model(path)
        wrong = [] if found_spec is spec else [f"it is a {found_spec.name}"]
        if wrong := wrong or differences(found, args):
            raise ConfigError(f"{path} is not {model}: {'; '.join(wrong)}. {_REMEDY}")
        return path, hf_weights(path, spec, args, model=model, remedy=_REMEDY)
    folder = find_for_all(path)
    weights = checkpoint_weights(folder)
    with torch.device("meta"):
        expected = shapes_of(spec.build(args))
    check_fit(weights.shapes, expected, where=str(folder), model=model, remedy=_REMEDY)
    theirs = read_state(folder).get("config", {}).get("model", {}).get("flavor", flavor)
    if theirs != flavor:
        logger.warning("%s is of flavor %s, and fits %s: only its weights are taken", folder, theirs, flavor)
    return folder, weights


def find_for_all(path: Path) -> Path:
    """`find_checkpoint`, which reads every file to verify it, by the first process for all."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [find_checkpoint(path)]
        except ConfigError as error:
            box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], ConfigError):
        raise box[0]
    folder: Path = box[0]
    return folder


@torch.no_grad()
def load_initial(
    model: nn.Module, path: Path, in_hf: bool, spec: models.ModelSpec, args: Any, flavor: str
) -> None:
    """Replace the initial weights of `model`, sharded or not, by those in `path`; see `initial_weights`."""
    folder, weights = initial_weights(path.expanduser(), in_hf, spec, args, flavor)
    for name, parameter in model.named_parameters():
        whole = weights.read(plain_name(name)).to(device=parameter.device, dtype=parameter.dtype)
        if isinstance(parameter, DTensor):
            # src_data_rank=None: every process has read the same values, so nothing needs to be sent
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(whole)
    logger.info("Training starts from the weights in %s", folder)


def export_folder(checkpoints: Path, step: int) -> Path:
    """Where the final export of a run of `step` steps goes."""
    return checkpoints / f"step-{step}-hf"


def check_exportable(spec: models.ModelSpec) -> None:
    """`ConfigError` unless models of `spec` can be exported: better before the training than after it."""
    files.library()
    if spec.hugging_face is None:
        raise ConfigError(
            f"checkpoint.last_save_in_hf = true: the model {spec.name} has no form in transformers; "
            "leave it out"
        )


def save_final(
    model: nn.Module, out: Path, dtype: str, spec: models.ModelSpec, args: Any, tokenizer: Tokenizer
) -> None:
    """Export `model`, sharded or not, into the folder `out`, in `dtype`; called by every process."""
    state: dict[str, Any] = get_model_state_dict(model)
    weights = Weights(
        "the model", {name: tuple(tensor.shape) for name, tensor in state.items()}, lambda n: _whole(state[n])
    )
    layout = HfLayout(spec, args, weights, DTYPES[dtype], _SHARD_BYTES)
    if dist.get_rank() == 0:
        write_folder(out, layout, tokenizer)
        logger.info("Exported the model, in Hugging Face's format, to %s", out)
    else:
        for names in layout.plan:
            for name in names:
                layout.read(name)  # takes part in the gathering
    dist.barrier()


def _whole(tensor: Any) -> Tensor:
    """A parameter as one tensor on the CPU."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to(tensor.device_mesh.device_type)  # parameters that are offloaded are gathered there
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    whole: Tensor = tensor.detach().cpu()
    return whole
