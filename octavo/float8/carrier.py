"""A tensor that looks high-precision and holds float8: what FSDP2 hands to a linear after a float8 all-gather."""
