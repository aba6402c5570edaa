"""Triton kernels that cast to float8: one file a job, the file's name is the job.

    file                      casts x[M, K] with                   reads of x    writes
    cast_tensor.py            one scale a tensor                   2             [M, K] and [K, M]
    cast_rows_columns.py      one scale a row, one a column        2             [M, K] and [K, M]
    cast_lines.py             1 x 128, or 1 x 32 one-byte scales   1             [M, K] and [K, M]
    cast_tiles.py             128 x 128                            1             [M, K] and [K, M]
    cast_given_maxima.py      one scale a row, one a column, the   1             [M, K] and [K, M]
                              maxima of both known
    cast_given_scale.py       one scale a tensor, known before x   1             [M, K] and [K, M]
    transpose_rows.py         float8 rows to float8 columns        1 (one byte)  [K, M]
    silu_mul.py               makes silu(a) * b and its gradients, and the maxima for the above
    add_rms_norm.py           makes RMSNorm(x + residual) and its gradients, likewise
    rope_backward.py          makes the gradient before a rotary embedding, likewise
    adamw_cast.py             makes new weights, and their float8 casts or the maxima for them

`numerics.py` holds the arithmetic that all share, `maxima.py` how tensors are written with their maxima.
`ops.py` registers the kernels with PyTorch, `report.py` compiles them for a GPU that need not be there.

PyTorch casts in separate passes: a maximum, a cast, and both again for the transpose. What a cast costs is
reading and writing, so each kernel makes all that it can of a tile while it holds it. Their arithmetic is
that of `octavo/float8/quantize.py` bit for bit, whatever the tile sizes: that file is their reference, and
the tests compare every configuration with it.

Kernels know tensors and numbers: no module, no recipe, no autograd. `octavo/float8/casts/gpu_cast.py` decides
which one serves a cast. Nothing imports them before a tensor on a GPU asks, so that triton is needed only
there.
"""
