"""Checkpoints: writing, verifying, reading and deleting them. `docs/reliability.md` describes their
guarantees.

Other programs read a checkpoint with `reader.read_model(step_folder)` and `reader.read_state(step_folder)`.
Importing this package does not import torch.
"""

from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint, NoCheckpointVerifies, RefusedCheckpoint
from octavo.checkpoint.store import latest

__all__ = ["DamagedCheckpoint", "NoCheckpointVerifies", "RefusedCheckpoint", "latest"]
