"""The optimizer, its low-precision states, and the learning-rate schedule."""
