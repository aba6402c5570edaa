"""A self-check of float8 on this device, and tracing the GPU path without a GPU."""
