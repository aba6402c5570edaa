"""The parts of the trainer: one file each, each given its own section of the configuration and no more."""
