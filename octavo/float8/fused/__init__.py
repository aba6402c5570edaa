"""A transformer block in fewer passes over memory, computed from its unchanged modules.

    NormedInput(norm, linears)    h = x + residual;  n = norm(h);  every linear of n
    GatedLinear(linear)           linear(silu(gate) * up)
    SharedInput(linears)          every linear of one x

The outputs of norm and SwiGLU are cast to float8 by kernels that compute the maxima for the cast as they
write; and linears with one input are one product, with their weights' casts concatenated in one buffer.
Modules, parameters and checkpoints are unchanged: these objects refer to the modules and compute with their
weights.

    attend, feed = NormedInput(block.norm1, (wq, wk, wv)), NormedInput(block.norm2, (w1, w3))
    down = GatedLinear(w2)
    h, (q, k, v) = attend(h)
    ...
    h, (gate, up) = feed(y, residual=h)
    h = h + down(gate, up).value

Each takes tensors, or the `Product`s that the others return. Where kernels are not supported (on a CPU, under
`use_kernels(False)`), plain PyTorch computes the same. Modules that cannot be bypassed (tensor parallel
weights, forward hooks, different recipes) are called one by one. Neither changes a result beyond rounding.

The price: forward hooks added after the first check are not called, and the products for gradients stay
separate, because joining them would need another copy of the gradients, or one scale for several tensors.
"""

from octavo.float8.fused.gate import GatedLinear
from octavo.float8.fused.norm import NormedInput
from octavo.float8.fused.shared_input import SharedInput
from octavo.float8.product import Product

__all__ = ["GatedLinear", "NormedInput", "Product", "SharedInput"]
