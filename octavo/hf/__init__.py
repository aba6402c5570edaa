"""Reads and writes models in Hugging Face's format, opens checkpoints as models, downloads from the hub."""
