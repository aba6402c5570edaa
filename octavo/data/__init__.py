"""Text to batches of tokens: reading, tokenising, packing, shuffling, and the state that a checkpoint saves.

Read `dataloader.py` first. Importing this package imports neither torch nor numpy.
"""
