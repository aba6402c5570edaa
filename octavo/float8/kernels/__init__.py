"""Triton kernels that cast to float8, one job per file.

    file                      casts x[M, K] with                   reads of x    writes
    cast_tensor.py            one scale per tensor                 2             [M, K] and [K, M]
    cast_rows_columns.py      one scale per row, one per column    2             [M, K] and [K, M]
    cast_lines.py             1 x 128, or 1 x 32 one-byte scales   1             [M, K] and [K, M]
    cast_tiles.py             128 x 128                            1             [M, K] and [K, M]
    cast_given_maxima.py      one scale per row, one per column,   1             [M, K] and [K, M]
                              given the maxima of both
    cast_given_scale.py       one scale per tensor, given amax     1             [M, K] and [K, M]
    silu_mul.py               silu(a) * b and its gradients, with the maxima for casting them
    add_rms_norm.py           RMSNorm(x + residual) and its gradients, likewise
    adamw_cast.py             an AdamW step, with the new weights' float8 casts or the maxima for them

`numerics.py` has the arithmetic that all share, `kernel_maxima.py` writes tensors with their maxima, and
`kernel_launch.py` tunes and launches. `ops.py` registers the kernels with PyTorch; `compile_report.py`
compiles them ahead of time, without a GPU.

Why kernels: a cast costs its memory traffic, and PyTorch casts in separate passes: a maximum, a cast, and
both again for the transpose. Each kernel computes all it can from a tile while it holds it. The arithmetic
equals `octavo/float8/quantize.py` bit for bit, whatever the tile sizes: `quantize_both` there is the
reference, and the tests compare every configuration with it.

Conventions, in all files:

    x                      contiguous [M, K] in bfloat16, float16 or float32
    data, scale            float8 [M, K], and its scales as in `Quantized.scale`
    data_t, scale_t        the cast of x transposed: float8 [K, M], and its scales
    dtype, scales          torch.float8_e4m3fn or torch.float8_e5m2; a key of `SCALE_FORMATS`
    rows, columns (bool)   whether data and data_t are wanted; what is not wanted is empty, [0, 0]
    maxima                 magnitudes as the int32 bits of float32, so that an integer maximum keeps NaN. They
                           are partial, e.g. one per tile; the reader reduces them

Kernels take tensors and numbers only: no module, recipe or autograd. `octavo/float8/casts/gpu_cast.py`
chooses the kernel for a cast. Nothing imports them before the first tensor on a GPU, so triton is needed only
there.
"""
