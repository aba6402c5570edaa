"""octavo: float8 pretraining on PyTorch. This module stays free of torch so that the command line starts
at once.
"""

__version__ = "0.1.0"
