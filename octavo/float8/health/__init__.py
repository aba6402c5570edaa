"""Measures what casting to float8 does to the values of each layer: how much is lost, where, and what another
recipe would lose.

For each operand and the cast of its recipe, where s is the multiplier before rounding:

    amax        the largest magnitude, unscaled; NaN or infinite if a value is
    flushed     share of all values that are nonzero, but zero after the cast
    saturated   share that exceeds the format's maximum after multiplying by s. With just-in-time scales these
                are only values that rounding s lifted over it; power-of-two scales leave none
    nonfinite   share that is NaN or infinite before the cast
    sqnr        10 log10(sum x**2 / sum (x - x')**2) in decibels, with x' the dequantized cast: about 30 for
                values that fill the format, infinite if nothing is lost, NaN if a value is not finite

`audit` measures one forward and backward. `Monitor` measures every k-th step of a training run, compiled or
not.

The values inside a compiled graph are not accessible. So the numbers leave it as a gradient: a measured layer
passes its output through a function that also takes a *probe*, a small leaf tensor. The function's backward
returns, as the probe's gradient, the statistics of the input, saved in forward, and those of grad_output. The
compiler fuses them with the casts, activation checkpointing counts them once, and steps that are not measured
run a graph without them.

The cost is computing the statistics. Scales need every value, but the compiler has them from the casts
already; a Monitor takes the other numbers from evenly spaced tokens. Weights are measured after backward.
"""

from octavo.float8.health.audit import audit
from octavo.float8.health.measurements import Measurement, Table
from octavo.float8.health.monitor import Monitor
from octavo.float8.health.watch import LayerFilter

__all__ = ["LayerFilter", "Measurement", "Monitor", "Table", "audit"]
