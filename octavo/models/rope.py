"""Rotary position embedding (RoPE, arXiv:2104.09864).

Pairs are interleaved, (x0, x1), (x2, x3), ..., as in Meta's checkpoints. Hugging Face rotates halves, which
is a permutation of rows (`hf_state_dict.py`). Compiled rotation is real arithmetic in float32, because
inductor generates no code for complex numbers.

Shapes: B batch, S sequence, H heads, E head width.
"""

import math

import torch
from torch import Tensor

from octavo.families.model_args import ModelArgs


def rope_frequencies(args: ModelArgs) -> Tensor:
    """The rotary frequencies [E/2] in radians per position, scaled by `args.rope_scaling` if it is set.

    Wavelengths shorter than original_context / high_freq_factor are kept, those longer than original_context
    / low_freq_factor are stretched by `factor`, and those in between are blended.
    """
    exponent = torch.arange(0, args.head_width, 2, dtype=torch.int64, device="cpu").float() / args.head_width
    freqs = 1.0 / (args.rope_theta**exponent)
    scaling = args.rope_scaling
    if scaling is None:
        return freqs
    turns = scaling.original_context * freqs / (2 * math.pi)  # full turns within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * freqs + (1 - keep) * freqs / scaling.factor


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
