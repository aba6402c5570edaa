"""Accidents at a given rank and step, for runs within tests, which import it by `experimental.custom_import`.

What happens stands in the variable OCTAVO_TEST_FAULT, as JSON: {"kind", "rank", "step", …}. A test must not
import it: the forked processes of its runs would have it already, without their variable.
"""

import json
import os
import signal
import sys
import time

import torch

from octavo.checkpoint.checkpointer import Checkpointer
from octavo.train import trainer as train
from tests.models import shallow_llama  # noqa: F401 - for `runs.shallow` beside a fault

Trainer = train.Trainer
FAULT = json.loads(os.environ.get("OCTAVO_TEST_FAULT", "{}"))
KIND = FAULT.get("kind")
MINE = FAULT.get("rank", 0) == int(os.environ.get("RANK", "0"))
now = 0  # the step that runs


def _strikes() -> bool:
    return MINE and FAULT["step"] <= now < FAULT["step"] + FAULT.get("steps", 1)


def _send() -> None:
    os.kill(os.getpid(), getattr(signal, FAULT.get("signal", "SIGTERM")))


def _accident() -> None:
    match KIND:
        case "exit":
            os._exit(FAULT["code"])
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(10**6)
        case "signal":
            _send()
        case "weight":
            with torch.no_grad():
                weight = trainer.model.get_parameter(FAULT["module"] + ".weight")
                weight = weight.to_local() if hasattr(weight, "to_local") else weight
                weight.view(-1)[0] = torch.nan


trainer: train.Trainer
_module = sys.modules[Trainer.__module__]
_step, _save, _gradients = Trainer._step, Checkpointer.save, Trainer._gradients
_validate = Trainer._validate
_build_model = _module.build_model


def step(self, number):
    """Trainer._step, with the accident before it."""
    global now, trainer
    now, trainer = number, self
    if _strikes():
        _accident()
    return _step(self, number)


def save(self, number, *args, **kwargs):
    """Checkpointer.save, with a signal within."""
    if KIND == "signal in save" and MINE and number == FAULT["step"]:
        _send()
    result = _save(self, number, *args, **kwargs)
    if KIND == "signal in save" and MINE and number == FAULT["step"]:
        _send()
    return result


def validate(self, *args):
    """Trainer._validate, with a signal before it."""
    if KIND == "signal in validation" and _strikes():
        _send()
    return _validate(self, *args)


class _Times(torch.autograd.Function):
    """The identity, with factors for the value and for its gradient."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None, None


def build_model(*args, **kwargs):
    """The trainer's build_model, with a hook on the module FAULT["module"]."""
    built = _build_model(*args, **kwargs)
    names = {name for name, _ in built.model.named_modules()}
    if FAULT.get("module") in names and KIND in ("activation", "gradient"):
        factors = (torch.nan, 1.0) if KIND == "activation" else (1.0, torch.nan)
        module = built.model.get_submodule(FAULT["module"])
        module.register_forward_hook(
            lambda _, inputs, output: _Times.apply(output, *factors) if _strikes() else None
        )
    return built


def gradients(self, *args):
    """Trainer._gradients, with another loss than was computed."""
    loss = _gradients(self, *args)
    return loss * FAULT["factor"] if KIND == "spike" and _strikes() else loss


if FAULT:
    Trainer._step, Checkpointer.save, Trainer._gradients = step, save, gradients
    Trainer._validate = validate
    _module.build_model = build_model
