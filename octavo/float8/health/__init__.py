"""What casting to float8 does to the values of each layer: how much is lost, where, and what another recipe
would lose.

For each operand, as its recipe casts it, with s what a value is multiplied by before it is rounded:

    amax        the largest magnitude, in the tensor's own unit; NaN or infinite if a value is
    flushed     share of all values that are not zero, but are once cast
    saturated   share that exceeds the format's maximum once multiplied by s. Scales made from the tensor at
                hand leave only what rounding s lifted over it; power-of-two scales leave none
    nonfinite   share that is NaN or infinite before the cast
    sqnr        10 log10(sum x**2 / sum (x - x')**2) in decibels, with x' what the cast stands for: about 30
                for values that fill the format, infinite where nothing is lost, NaN if a value is not finite

`audit` measures one forward and backward. `Monitor` measures every k-th step of a training run, compiled or
not.

A compiled graph hides its tensors. So the numbers leave it as a gradient: a watched layer passes its output
through a function that also takes a *probe*, a small leaf tensor; and what its backward calls the gradient of
the probe is the statistics of the input, kept from forward, and those of grad_output. The compiler fuses them
with the casts, activation checkpointing counts them once, and a step that is not measured runs a graph
without them.

What remains is the cost of computing them. Scales need every value, but the compiler has them from the casts
already; the other numbers a Monitor takes from evenly spaced tokens. Weights are measured after backward.
"""

from octavo.float8.health.audit import audit
from octavo.float8.health.measurements import Measurement, Table
from octavo.float8.health.monitor import Monitor
from octavo.float8.health.watch import LayerFilter

__all__ = ["LayerFilter", "Measurement", "Monitor", "Table", "audit"]
