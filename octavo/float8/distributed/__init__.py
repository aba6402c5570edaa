"""Float8 communication of weights (FSDP2) and activations (tensor parallelism)."""
