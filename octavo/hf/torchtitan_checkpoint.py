"""torchtitan's checkpoints of Llama 3 as initial weights: DCP folders without octavo's manifest and state.

Names and row order are ours; parameters are at the top level of the folder, or below "model.". Only tensors
of the model are read, and nothing is unpickled (`checkpoint/reader.py`): the optimizer, the learning rate,
the position in the data and the step stay behind. The folder has no hashes, so damage to a tensor is not
detected.

Until 2025 the model's table of rotations was saved too. It is no parameter; it must be that of our model.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from octavo.checkpoint import manifest, metadata
from octavo.checkpoint.reader import STATE, CheckpointReader
from octavo.config import ConfigError
from octavo.hf.stored_weights import Weights
from octavo.models.rope import rope_frequencies

_NOT_THE_MODEL = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")
_ROTATIONS = "freqs_cis"  # e^(i angle) of each position and frequency


def is_torchtitan_checkpoint(folder: Path) -> bool:
    """Whether `folder` is of DCP, but not octavo's."""
    ours = any((folder / name).exists() for name in (STATE, manifest.FILE))
    return (folder / metadata.FILE).is_file() and not ours


def open_torchtitan_weights(folder: Path, args: Any) -> Weights:
    """The parameters in `folder`, for the model of `args`.

    Raises:
        ConfigError: the rotations are of another model.
        DamagedCheckpoint: the metadata cannot be read.
        RefusedCheckpoint: they ask for something that no checkpoint needs.
    """
    reader = CheckpointReader(folder)
    shapes = {
        name: tuple(entry.size)
        for name, entry in reader.metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(_NOT_THE_MODEL)
    }
    prefix = "model." if all(name.startswith("model.") for name in shapes) else ""
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    if shapes.pop(_ROTATIONS, None) is not None:
        angles = reader.read_tensor(prefix + _ROTATIONS)[1].angle()  # of position 1, so the frequencies
        ours = rope_frequencies(args)
        if angles.shape != ours.shape or not torch.allclose(angles, ours, rtol=1e-4):
            raise ConfigError(
                f"{folder}: {_ROTATIONS} has other rotary frequencies than the model; set model.flavor, and "
                "rope_theta or rope_scaling in model.args, to those of the checkpoint"
            )
    return Weights(str(folder), shapes, lambda name: reader.read_tensor(prefix + name))
