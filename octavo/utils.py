"""torchao's version flags, under the same import path. octavo needs torch 2.11, so all are true."""

TORCH_VERSION_AT_LEAST_2_5 = True
TORCH_VERSION_AT_LEAST_2_6 = True
TORCH_VERSION_AT_LEAST_2_7 = True
TORCH_VERSION_AT_LEAST_2_8 = True

__all__ = [
    "TORCH_VERSION_AT_LEAST_2_5",
    "TORCH_VERSION_AT_LEAST_2_6",
    "TORCH_VERSION_AT_LEAST_2_7",
    "TORCH_VERSION_AT_LEAST_2_8",
]
