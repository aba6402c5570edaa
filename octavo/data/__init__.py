"""Text in, batches of tokens out: reading files, packing, shuffling, and what a checkpoint keeps of it.

`loader.py` is the file to read first. Importing this package costs nothing: no torch and no numpy.
"""
