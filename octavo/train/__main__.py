"""`python -m octavo.train`: one training process of a job."""

import gc
import sys

from octavo.core.streams import open_closed_streams

open_closed_streams()
gc.disable()  # imported objects are never freed; scanning them takes a sixth of the import time

import torch  # noqa: E402

from octavo.core.exit_codes import leave  # noqa: E402
from octavo.train.trainer import main  # noqa: E402

gc.freeze()
code = main()
if torch.cuda.is_available():
    sys.exit(code)  # GPU tracing tools write their results at normal exit
leave(code)
