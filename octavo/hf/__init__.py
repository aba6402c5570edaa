"""Models in and out of Hugging Face's format, and the checkpoints that can be read as models."""
