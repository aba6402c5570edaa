"""`python -m octavo.train`: one training process of a job."""

import gc
import sys

gc.disable()  # objects made by imports live to the end; scanning them takes a sixth of the imports' time

import torch  # noqa: E402

from octavo.core.exit_codes import leave  # noqa: E402
from octavo.train.trainer import main  # noqa: E402

gc.freeze()
code = main()
if torch.cuda.is_available():
    sys.exit(code)  # tools that trace a GPU write their findings when its libraries are unloaded
leave(code)
