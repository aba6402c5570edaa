"""Roofline model: peak rates of GPUs, and the predicted time of GEMMs, casts, attention and layers.

octavo measures none of the figures: each has its source, and `E` marks an estimate. All modules but
`timing.py` work without torch. Read `devices.py` first, then `layer.py`.
"""

from octavo.roofline.casts import WAYS, Tensors, cast_bytes, cast_seconds
from octavo.roofline.devices import GPUS, Gpu, find_gpu, gpu_of
from octavo.roofline.gemm import Shape, attention_seconds, gemm_seconds, linear_shapes
from octavo.roofline.layer import LLAMA3_8B, Block, LayerTime, layer_time

__all__ = [
    "GPUS",
    "LLAMA3_8B",
    "WAYS",
    "Block",
    "Gpu",
    "LayerTime",
    "Shape",
    "Tensors",
    "attention_seconds",
    "cast_bytes",
    "cast_seconds",
    "find_gpu",
    "gemm_seconds",
    "gpu_of",
    "layer_time",
    "linear_shapes",
]
