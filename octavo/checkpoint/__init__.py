"""Checkpoints: how they are written, verified, read and kept. `docs/reliability.md` tells the whole."""
