"""The configuration of a training job: dataclasses, a strict TOML file, and flags on top. Free of torch and
numpy.

`load` turns a command line into a `JobConfig`, or raises `ConfigError` with a message that is ready to print.
Read `schema.py` for the keys and `names.py` for what they may be set to. Whether the job can run is a
question for `octavo.preflight`.
"""

from octavo.config import names
from octavo.config.loader import load
from octavo.config.schema import JobConfig
from octavo.core.errors import ConfigError

__all__ = ["ConfigError", "JobConfig", "load", "names"]
