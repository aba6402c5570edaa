"""Accidents at a given rank and step, for runs within tests, which import it by `experimental.custom_import`.

What happens stands in the variable OCTAVO_TEST_FAULT, as JSON: {"kind", "rank", "step", …}. A test must not
import it: the forked processes of its runs would have it already, without their variable.
"""

import json
import os
import signal
import time

import torch

from octavo.train.hooks import Hook, register
from tests.models import shallow_llama  # noqa: F401 - for `runs.shallow` beside a fault


class _Times(torch.autograd.Function):
    """The identity, with factors for the value and for its gradient."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None, None


def _outlier(x):
    """`x` with one value that is far larger than the rest; in rowwise it spoils one row and one column."""
    x = x.clone()
    x[0, 0, 0] = 1e6
    return x


class Fault(Hook):
    """The accident that OCTAVO_TEST_FAULT describes; with `once`, not again after a rewind."""

    def __init__(self, trainer):
        self.trainer, self.step = trainer, 0
        self.fault = json.loads(os.environ.get("OCTAVO_TEST_FAULT", "{}"))
        self.kind = self.fault.get("kind")
        self.mine = self.fault.get("rank", 0) in (trainer.world.rank, "all")
        names = {name for name, _ in trainer.model.named_modules()}
        if self.fault.get("module") in names:
            self.spoil(trainer.model.get_submodule(self.fault["module"]))
        if self.kind == "signal in validation":
            trainer.model.register_forward_pre_hook(self.in_forward)
        if self.kind == "signal in save":
            self.save, trainer.checkpoints.saver.save = trainer.checkpoints.saver.save, self.in_save

    def spoil(self, module):
        """Make something within the module wrong whenever the fault strikes."""
        if self.kind in ("activation", "gradient"):
            factors = (torch.nan, 1.0) if self.kind == "activation" else (1.0, torch.nan)
            module.register_forward_hook(
                lambda _, inputs, output: _Times.apply(output, *factors) if self.strikes() else None
            )
        if self.kind == "outlier":
            module.register_forward_pre_hook(lambda _, inputs: _outlier(*inputs) if self.strikes() else None)

    def strikes(self):
        again = self.fault.get("once") and self.trainer.guard.rewinds
        first, steps = self.fault.get("step"), self.fault.get("steps", 1)
        return self.mine and bool(self.fault) and first <= self.step < first + steps and not again

    def before_step(self, step):
        self.step = step
        if not self.strikes():
            return
        match self.kind:
            case "exit":
                os._exit(self.fault["code"])
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(10**6)
            case "signal":
                self.send()
            case "weight":
                with torch.no_grad():
                    weight = self.trainer.model.get_parameter(self.fault["module"] + ".weight")
                    weight = weight.to_local() if hasattr(weight, "to_local") else weight
                    weight.view(-1)[0] = torch.nan

    def after_backward(self, record):
        if self.kind == "spike" and self.strikes():
            record.local_loss *= self.fault["factor"]

    def send(self):
        os.kill(os.getpid(), getattr(signal, self.fault.get("signal", "SIGTERM")))

    def in_forward(self, module, inputs):
        if not module.training and self.strikes():
            self.send()

    def in_save(self, step, *args):
        strikes = self.mine and step == self.fault["step"]
        if strikes:
            self.send()
        self.save(step, *args)
        if strikes:
            self.send()


register(Fault)
if json.loads(os.environ.get("OCTAVO_TEST_FAULT", "{}")).get("kind") == "signal at import":
    os.kill(os.getpid(), signal.SIGTERM)
