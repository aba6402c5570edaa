"""Rotary position embedding (RoPE, arXiv:2104.09864).

Pairs are interleaved, (x0, x1), (x2, x3), ..., as in Meta's checkpoints. Hugging Face rotates halves, which
is a permutation of rows (`hf_state_dict.py`). Compiled rotation is real arithmetic in float32, because
inductor generates no code for complex numbers.

Shapes: B batch, S sequence, H heads, E head width.
"""

import math

import torch
from torch import Tensor

from octavo.families.model_args import ModelArgs, RopeScaling, Yarn


def rope_frequencies(args: ModelArgs) -> Tensor:
    """The rotary frequencies [E/2] in radians per position, scaled by `args.rope_scaling` if it is set: high
    frequencies are kept, low ones are divided by `factor`, and those in between are blended.
    """
    width, scaling = args.rope_width, args.rope_scaling
    exponent = torch.arange(0, width, 2, dtype=torch.int64, device="cpu").float() / width
    freqs = 1.0 / (args.rope_theta**exponent)
    if scaling is None:
        return freqs
    if isinstance(scaling, Yarn):
        keep = _kept_by_index(scaling, args.rope_theta, width)
    else:
        keep = _kept_by_turns(scaling, freqs)
    return keep * freqs + (1 - keep) * freqs / scaling.factor


def _kept_by_turns(scaling: RopeScaling, freqs: Tensor) -> Tensor:
    """Share of each frequency that is kept, by Llama 3.1: linear in the turns within the original context."""
    turns = scaling.original_context * freqs / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return keep.clamp(0.0, 1.0)


def _kept_by_index(scaling: Yarn, theta: float, width: int) -> Tensor:
    """Share of each frequency that is kept, by YaRN: linear in the index of the frequency."""

    def index(turns: float) -> float:
        """Of the frequency with so many turns within the original context."""
        return width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index(scaling.beta_fast)), 0)
    high = min(math.ceil(index(scaling.beta_slow)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0.0, 1.0)


def logit_scale(args: ModelArgs) -> float:
    """What YaRN multiplies attention's logits by; 1 without it."""
    scaling = args.rope_scaling
    if not isinstance(scaling, Yarn) or scaling.factor <= 1:
        return 1.0
    return (0.1 * scaling.mscale * math.log(scaling.factor) + 1) ** 2


def rope_table(args: ModelArgs) -> Tensor:
    """cos and sin of the angles of every position, float32 [2, max_seq_len, E/2]."""
    positions = torch.arange(args.max_seq_len, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, rope_frequencies(args))
    return torch.stack((angles.cos(), angles.sin()))


def apply_rope(x_BSHE: Tensor, table_2SE: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) by its position's angle: in float32, returned in x's dtype."""
    cos, sin = table_2SE[:, : x_BSHE.shape[1], None, :].float()
    pairs = x_BSHE.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor fuses real operations and has no complex ones
        even, odd = pairs.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # the same values in one pass over memory instead of seven
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return rotated.flatten(-2).type_as(x_BSHE)
