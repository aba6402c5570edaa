"""Handles signals that ask a run to stop: they are recorded, and the loop stops at the next step boundary.
While a run starts, which may take minutes and loses nothing, a signal ends it at once.

A handler may run in the middle of a save or a collective, so it only records the signal. The training loop
shares the request with all processes (in the all-reduce that each step does anyway), saves, and exits.
Several signals, or one sent to both the launcher and every process, count as one request. Exception: a second
Ctrl-C, at least a second after the first signal, ends the process immediately. Published checkpoints stay
complete because publishing is one rename.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch.distributed as dist

from octavo.core import exit_codes

_INSISTS_AFTER = 1.0  # seconds; sooner, it is the same Ctrl-C, forwarded by the launcher


class Stopped(Exception):
    """Training stopped because of a signal. together: on all processes, at a step boundary."""

    def __init__(self, message: str, exit_code: int, *, together: bool = True):
        super().__init__(message)
        self.exit_code, self.together = exit_code, together

    @classmethod
    def at_start(cls, number: signal.Signals, *, saves: bool) -> "Stopped":
        """This process stopped while it was starting. saves: whether the run saves checkpoints."""
        code = exit_codes.REQUEUE if saves else exit_codes.of_signal(number)
        again = "Rerun the command to start again" if saves else "Nothing was saved, as no step was run"
        rank = os.environ.get("RANK", "0")
        return cls(
            f"Stopped by {number.name} on rank {rank} while starting. {again} (exit code {code})",
            code,
            together=False,
        )

    @classmethod
    def after(cls, step: int, received: Mapping[int, int], *, saves: bool, saved: int | None) -> "Stopped":
        """Stopped after `step` steps. received: rank -> signal. saves: whether the run saves checkpoints.
        saved: the step of the newest checkpoint, None if there is none; 0 before the first step.
        """
        by = ", ".join(f"{signal.Signals(number).name} on rank {rank}" for rank, number in received.items())
        text = f"Stopped by {by} {f'after step {step}' if step else 'before the first step'}"
        if not saves:
            code = exit_codes.of_signal(min(received.values()))
            return cls(f"{text}. Nothing was saved: the job saves no checkpoints (exit code {code})", code)
        if saved == step:
            saved_here = ", which is saved" if step else ""
            text += f"{saved_here}. Rerun the command to continue with step {step + 1}"
        else:
            text += ", which could not be saved. Rerun the command to continue from the previous checkpoint"
        return cls(f"{text} (exit code {exit_codes.REQUEUE})", exit_codes.REQUEUE)


class Signals:
    """Handles the stop signals within `with`.

    received: the first stop signal, or None. saves: whether the run saves checkpoints, so that it can resume.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.saves = False
        self._at = 0.0
        self._starting = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            for number in exit_codes.STOPPING:
                former = signal.getsignal(number)
                if number is signal.SIGHUP and former is signal.SIG_IGN:
                    continue  # under nohup
                self._former[number] = former
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)
        self._former.clear()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """The scope of everything before the first step: a signal raises `Stopped` at once, and so does an
        error that follows from one, as when it also ended another process.
        """
        self._starting = True
        try:
            if self.received is not None:
                raise Stopped.at_start(self.received, saves=self.saves)
            yield
        except Exception as error:
            if self.received is None or isinstance(error, Stopped):
                raise
            raise Stopped.at_start(self.received, saves=self.saves) from error
        finally:
            self._starting = False

    @property
    def asked(self) -> float:
        """1 if a stop signal was received, else 0; a number, so that it can be summed over processes."""
        return float(self.received is not None)

    def gather(self) -> dict[int, int]:
        """The received signal of each rank that has one, rank -> signal; a collective call."""
        received: list[int | None] = [None] * dist.get_world_size()
        dist.all_gather_object(received, self.received and int(self.received))
        return {rank: number for rank, number in enumerate(received) if number is not None}

    def ask(self, number: int) -> None:
        """Record that signal `number` was received by this process, or by the launcher before it started."""
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        insists = number == signal.SIGINT and self.received is not None
        if insists and time.monotonic() - self._at >= _INSISTS_AFTER:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.ask(number)
        if self._starting and self.received is not None:
            self._starting = False  # once: more signals must not interrupt the way out
            raise Stopped.at_start(self.received, saves=self.saves)
