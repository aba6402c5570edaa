"""Checkpoints: how they are written, verified, read and kept. `docs/reliability.md` tells the whole.

`reader.py` has what other programs read by: `read_model(step_folder)` and `read_state(step_folder)`. Nothing
here imports torch.
"""

from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint, NoCheckpointVerifies, RefusedCheckpoint
from octavo.checkpoint.store import latest

__all__ = ["DamagedCheckpoint", "NoCheckpointVerifies", "RefusedCheckpoint", "latest"]
