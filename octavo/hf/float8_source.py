"""Weights that are published in float8, as DeepSeek-V3's: e4m3 codes, and one float32 factor per block of
128 x 128, under the name of the weight and `_scale_inv`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.config import ConfigError
from octavo.hf.safetensors_folder import StoredTensor, read_tensor

BLOCK = 128
CODES = "F8_E4M3"
_SUFFIX = "_scale_inv"


def without_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of `stored` that are weights.

    Raises:
        ConfigError: a weight in float8 has no scales, or not one per block.
    """
    scales = {name for name in stored if name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX) in stored}
    for name, tensor in stored.items():
        if tensor.dtype != CODES:
            continue
        blocks = tuple(math.ceil(size / BLOCK) for size in tensor.shape)
        found = stored[f"{name}{_SUFFIX}"].shape if f"{name}{_SUFFIX}" in scales else "none"
        if found != blocks:
            raise ConfigError(
                f"{tensor.file}: {name} {tensor.shape} is stored as {CODES} with {found} scales; octavo "
                f"reads one per block of {BLOCK} x {BLOCK}, {blocks}; use the model in another precision"
            )
    return {name: tensor for name, tensor in stored.items() if name not in scales}


def read_weight(stored: Mapping[str, StoredTensor], name: str) -> Tensor:
    """The tensor `name` on the CPU; one in float8 is dequantised to float32."""
    tensor = read_tensor(stored[name], name)
    if stored[name].dtype != CODES:
        return tensor
    scale = read_tensor(stored[f"{name}{_SUFFIX}"], f"{name}{_SUFFIX}").float()
    return dequantize(tensor, scale)


def dequantize(codes_NK: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight of e4m3 codes and one factor per block."""
    rows, columns = codes_NK.shape
    factors = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return codes_NK.to(torch.float32) * factors
