"""Trying float8 out: a self-check on this device, and tracing the GPU path without a GPU."""
