"""FSDP2's all-gather of weights in float8: the sharded weight, its two hooks and one all-reduce for all scales."""
