"""Float8 under FSDP2 and tensor parallelism: weights and activations that travel as float8."""
