"""Model-independent parallelism: meshes, sharding, activation checkpointing."""
