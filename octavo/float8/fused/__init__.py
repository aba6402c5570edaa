"""A transformer block in fewer passes over memory, from the modules that it consists of.

    NormedInput(norm, linears)    h = x + residual;  n = norm(h);  every linear of n
    GatedLinear(linear)           linear(silu(gate) * up)
    SharedInput(linears)          every linear of one x

What the first two make is cast to float8 at once, by kernels that note the maxima a cast needs while they
write the value; and linears that read one input are one product, their weights' casts standing below each
other in one buffer. Modules, parameters and checkpoints stay what they were: these objects hold the modules
and compute with their weights.

    attend, feed = NormedInput(block.norm1, (wq, wk, wv)), NormedInput(block.norm2, (w1, w3))
    down = GatedLinear(w2)
    h, (q, k, v) = attend(h)
    ...
    h, (gate, up) = feed(y, residual=h)
    h = h + down(gate, up).value

Each takes tensors, or the `Product`s that the others return. Where a kernel does not serve (on a CPU, under
`use_kernels(False)`) the same is computed in plain PyTorch; where modules cannot be read past (tensor
parallel weights, forward hooks, members in different recipes) they are called one by one. Neither changes a
result beyond rounding.

The price is that forward hooks of the modules see nothing as long as there are none when the block runs, and
that the products for gradients stay separate: joining them would take one more copy of the gradients, or one
scale for several tensors.
"""

from octavo.float8.fused.gate import GatedLinear
from octavo.float8.fused.norm import NormedInput
from octavo.float8.fused.product import Product
from octavo.float8.fused.shared_input import SharedInput

__all__ = ["GatedLinear", "NormedInput", "Product", "SharedInput"]
