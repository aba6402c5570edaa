"""What the GPU benchmarks should show. No torch: scripts that only read results import this, too."""

from collections.abc import Mapping

OVER_BF16: Mapping[str, float] = {
    "rowwise fused": 1.38,
    "tensorwise fused": 1.40,
    "tensorwise_previous_step fused": 1.47,
}
"""Side of layer_stack.py -> speedup over compiled bfloat16 on an H100."""
OVER_TORCHAO: Mapping[str, float] = {"rowwise": 1.18, "tensorwise": 1.10}
"""Recipe -> speedup over torchao's layers of the same recipe on an H100."""
PEAK_OVER_BF16 = 0.80
"""Peak memory of layer_stack.py's fused sides over bfloat16's, at most."""
COPY_SHARE = 0.85
"""Speed of a cast kernel over that of a copy of as many bytes, at least."""
