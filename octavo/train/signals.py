"""Signals that ask a run to stop: remembered here, acted on by the loop at the next step boundary.

A handler that did more would run between any two instructions of a save or a collective. So it notes the
signal and returns; the training loop lets all processes agree (the note travels with the all-reduce that each
step makes anyway), saves, and leaves. A scheduler that sends several signals, or one signal to the launcher
and to every process, asks once. The one exception is a second Ctrl-C from someone who will not wait: at least
a second after the first signal, it ends the process at once, and published checkpoints are whole because
publishing is one rename.
"""

import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch.distributed as dist

from octavo.core import exit_codes

_INSISTS_AFTER = 1.0  # seconds; below, it is the same Ctrl-C that came by two ways


class Stopped(Exception):
    """Training ended at a step boundary because a signal asked for it."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code

    @classmethod
    def after(cls, step: int, received: Mapping[int, int], *, saves: bool, saved: int | None) -> "Stopped":
        """After `step` steps. received: rank -> signal. saves: whether the run saves checkpoints. saved: the
        step that the newest has, None where there is none; 0 before the first step.
        """
        by = ", ".join(f"{signal.Signals(number).name} on rank {rank}" for rank, number in received.items())
        told = f"Stopped by {by} {f'after step {step}' if step else 'before the first step'}"
        if not saves:
            code = exit_codes.of_signal(min(received.values()))
            return cls(f"{told}. Nothing was saved: the job saves no checkpoints (exit code {code})", code)
        if saved == step:
            told += f"{', which is saved' if step else ''}. The same command goes on with step {step + 1}"
        else:
            told += ", which could not be saved. The same command goes on from the checkpoint before it"
        return cls(f"{told} (exit code {exit_codes.REQUEUE})", exit_codes.REQUEUE)


class Signals:
    """`received` is the first signal that asked to stop, or None. Handlers stand within `with`. `saves`:
    whether the run saves checkpoints, so that the same command would go on.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.saves = False
        self._at = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            for number in exit_codes.STOPPING:
                former = signal.getsignal(number)
                if number is signal.SIGHUP and former is signal.SIG_IGN:
                    continue  # nohup
                self._former[number] = former
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)
        self._former.clear()

    @property
    def asked(self) -> float:
        """1 if a signal has asked to stop, else 0: to be added up over the processes."""
        return float(self.received is not None)

    def gather(self) -> dict[int, int]:
        """rank -> the signal that it received, for those that did; a collective."""
        received: list[int | None] = [None] * dist.get_world_size()
        dist.all_gather_object(received, self.received and int(self.received))
        return {rank: number for rank, number in enumerate(received) if number is not None}

    def ask(self, number: int) -> None:
        """Note that `number` was received, here or where it had to wait for this process."""
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        insists = number == signal.SIGINT and self.received is not None
        if insists and time.monotonic() - self._at >= _INSISTS_AFTER:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.ask(number)
