"""GPUs as data: the one table of peaks, bandwidths and sizes, for the trainer, estimates and benchmarks.

Units: FLOP/s, bytes/s and bytes; links per GPU and direction. Peaks are dense, from the makers' data sheets
(sparse figures halved). A ceiling is the best published rate of a large GEMM; without a published figure,
the H100's share of its peak is assumed (`bf16_ceiling`, `float8_ceiling`). E: our estimate.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

_T, _G = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU model. part: a substring of the driver's name for it.

    bf16, float8: dense peak; None: no such units. bf16_seen, float8_seen: published rate of a large GEMM.
    attention: FLOP/s of fused causal attention, (forward, backward). hbm, hbm_bytes: memory, as advertised;
    drivers report about 5 % more, which covers the CUDA context, NCCL and fragmentation. link: to a neighbour
    in the machine; network: to another machine. sms: streaming multiprocessors (compute units). capability:
    which float8 products its units have; (0, 0): none that we use.
    """

    name: str
    part: str
    bf16: float
    float8: float | None
    hbm: float
    hbm_bytes: float
    link: float
    network: float
    sms: int
    attention: tuple[float, float]
    bf16_seen: float | None = None
    float8_seen: float | None = None
    capability: tuple[int, int] = (9, 0)
    in_a_machine: int = 8

    @property
    def bf16_ceiling(self) -> float:
        """FLOP/s of a large bfloat16 product."""
        return self.bf16_seen or self.bf16 * _SHARE_BF16

    @property
    def float8_ceiling(self) -> float | None:
        """FLOP/s of a large float8 product; None without float8 units."""
        return self.float8_seen or (self.float8 and self.float8 * _SHARE_FLOAT8)


# cuBLAS on an H100 SXM at 8192 x 8192 x 8192, quoted: 765 and 1297 TFLOP/s.
_H100_BF16, _H100_FLOAT8 = 765 * _T, 1297 * _T
_SHARE_BF16, _SHARE_FLOAT8 = _H100_BF16 / (989 * _T), _H100_FLOAT8 / (1979 * _T)

# Causal, head width 128, 8192 tokens, read off the plots of FlashAttention-3 (arXiv:2407.08608, figures 5 and
# 6); E to some 5 %. cuDNN's reaches about as much.
_FA3: Final = (600 * _T, 475 * _T)
FLASH_ATTENTION_2: Final = (370 * _T, 280 * _T)
"""The same of FlashAttention-2 on an H100, from the same plots: what PyTorch's own flash kernel reaches."""


def _attention(peak: float) -> tuple[float, float]:
    """E: FlashAttention-3's share of an H100's peak."""
    return _FA3[0] * peak / (989 * _T), _FA3[1] * peak / (989 * _T)


_TABLE = (
    # NVIDIA H100 data sheet, NVL column: 3.9 TB/s, 94 GB; NVLink bridge 600 GB/s both ways.
    Gpu("h100-nvl", "H100 NVL", 835 * _T, 1670 * _T, 3.9e12, 94 * _G, 300 * _G, 50 * _G, 132,
        _attention(835 * _T)),
    # NVIDIA H100 PCIe product brief: 114 SMs, 2.0 TB/s, 80 GB; PCIe 5 x16 64 GB/s a direction.
    Gpu("h100-pcie", "H100 PCIe", 756 * _T, 1513 * _T, 2.0e12, 80 * _G, 64 * _G, 50 * _G, 114,
        _attention(756 * _T)),
    # NVIDIA H100 data sheet, SXM column: 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: one 400 Gb/s
    # network card a GPU.
    Gpu("h100", "H100", 989 * _T, 1979 * _T, 3.35e12, 80 * _G, 450 * _G, 50 * _G, 132, _FA3,
        _H100_BF16, _H100_FLOAT8),
    # NVIDIA H200 data sheet, NVL column: 1671 and 3341 TFLOP/s with sparsity, 141 GB, 4.8 TB/s; NVLink bridge
    # 900 GB/s both ways.
    Gpu("h200-nvl", "H200 NVL", 835.5 * _T, 1670.5 * _T, 4.8e12, 141 * _G, 450 * _G, 50 * _G, 132,
        _attention(835.5 * _T)),
    # NVIDIA H200 data sheet, SXM column: 141 GB, 4.8 TB/s; the same chip.
    Gpu("h200", "H200", 989 * _T, 1979 * _T, 4.8e12, 141 * _G, 450 * _G, 50 * _G, 132, _FA3,
        _H100_BF16, _H100_FLOAT8),
    # NVIDIA HGX B200 data sheet: 180 GB, 7.7 TB/s, NVLink 1.8 TB/s both ways.
    Gpu("b200", "B200", 2250 * _T, 4500 * _T, 7.7e12, 180 * _G, 900 * _G, 50 * _G, 148,
        _attention(2250 * _T), capability=(10, 0)),
    # NVIDIA A100 data sheet, 80 GB SXM: 2.039 TB/s, NVLink 600 GB/s both ways; DGX A100: 200 Gb/s a GPU.
    # Attention: FlashAttention-2 (arXiv:2307.08691, figures 5 and 6), causal, read off; E.
    Gpu("a100", "A100", 312 * _T, None, 2.039e12, 80 * _G, 300 * _G, 25 * _G, 108, (195 * _T, 165 * _T),
        capability=(8, 0)),
    # NVIDIA L40S data sheet: 48 GB, 864 GB/s, PCIe 4 x16. Network E.
    Gpu("l40s", "L40S", 362 * _T, 733 * _T, 0.864e12, 48 * _G, 32 * _G, 25 * _G, 142, _attention(362 * _T),
        capability=(8, 9)),
    # AMD Instinct MI300X data sheet: 192 GB, 5.3 TB/s, 7 links of 64 GB/s a direction. Products:
    # SemiAnalysis, December 2024, 620 and 990 TFLOP/s. Attention E.
    Gpu("mi300x", "MI300X", 1307 * _T, 2615 * _T, 5.3e12, 192 * _G, 448 * _G, 50 * _G, 304,
        (400 * _T, 300 * _T), 620 * _T, 990 * _T, capability=(0, 0)),
    # NVIDIA Ada architecture paper, products accumulated in float32: 24 GB, 1008 GB/s, PCIe 4 x16. Network E.
    Gpu("rtx4090", "RTX 4090", 165 * _T, 330 * _T, 1.008e12, 24 * _G, 32 * _G, 12.5 * _G, 128,
        _attention(165 * _T), capability=(8, 9)),
)  # fmt: skip

GPUS: Final[Mapping[str, Gpu]] = MappingProxyType({gpu.name: gpu for gpu in _TABLE})
"""By the name that commands take. Special cases stand before the general ones: `gpu_of` takes the first."""

_LESS_THAN_WHOLE = re.compile(
    r"\b(MIG|Laptop|Max-Q|4090 D|GRID|H100 \d+GB HBM2e?)\b|-\d+(-\d+)?[ABCQ](ME)?\b"
)


def gpu_of(driver_name: str) -> Gpu | None:
    """The GPU that the driver calls `driver_name` ("NVIDIA H100 80GB HBM3"); None if it is not in the
    table: a slice of one (MIG, or a vGPU such as H100-20C), a slower relative (RTX 4090 Laptop, an H100 with
    HBM2), or a name that merely contains one (GB200).
    """
    if _LESS_THAN_WHOLE.search(driver_name):
        return None
    return next((gpu for gpu in _TABLE if re.search(rf"\b{gpu.part}\b", driver_name)), None)


def find_gpu(name: str) -> Gpu:
    """The GPU called `name` in commands: h100, H100-NVL, h100_nvl. `ValueError`, with the names, if there is
    none.
    """
    try:
        return GPUS[name.lower().replace("_", "-").replace(" ", "-")]
    except KeyError:
        raise ValueError(
            f"no GPU is called {name!r} in the table; it has: {', '.join(sorted(GPUS))}"
        ) from None
