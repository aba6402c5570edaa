"""A hook that leaves in the run's folder what each step read of tensors; for `experimental.custom_import`."""

import json

from octavo.train.hooks import Hook, register
from tests.models import shallow_llama  # noqa: F401 - for `launching.shallow` beside it
from tests.train.test_host_waits import HostReads


@register
class CountReads(Hook):
    def __init__(self, trainer):
        self.folder, self.reads = trainer.folder.path, HostReads()

    def before_step(self, step):
        self.reads = HostReads()
        self.reads.__enter__()

    def after_step(self, record):
        self.reads.__exit__(None, None, None)
        (self.folder / f"reads{record.step}.json").write_text(json.dumps(self.reads.calls))
