"""Heartbeats between the launchers of several machines, so that each knows why a job ends.

Each launcher supervises the processes of its own machine. When one dies, ranks elsewhere wait for it: gloo
notices the broken connection, NCCL may wait until its timeout, and neither reports who died or where. So the
launchers exchange beats through the store that torchrun's rendezvous opens at RDZV_ENDPOINT. Every half
second each writes its name, the state of its processes and a growing number, and reads those of the others.

A death reported by another launcher ends the processes here, as a death here does. So does a launcher that
disappears: the one that hosts the store is missed at once, another one after `TIMEOUT` seconds, because a
busy machine may be silent for a few. Once the processes here have failed, `TIMEOUT_AFTER_FAILURE` seconds of
silence are enough to name the silent machine.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

TIMEOUT = 15.0
TIMEOUT_AFTER_FAILURE = 3.0
_INTERVAL = 0.5
_STAYS_FOR = 3 * _INTERVAL


@dataclass(frozen=True)
class Rendezvous:
    """Where the launchers of a job meet: the store's address, the job's name and the number of machines.

    number: of this machine, if they are numbered. Number 0 hosts the store; without numbers, a launcher on
    `host` does.
    """

    host: str
    port: int
    job: str
    machines: int
    timeout: float
    number: int | None = None


@dataclass(frozen=True)
class Beat:
    """What one launcher reports.

    beat: grows with each report. ranks: of its processes. deaths: a sentence for each that died. over: its
    processes have ended, for a reason that other machines report or for none.
    """

    machine: str
    beat: int = 0
    ranks: list[int] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    over: bool = False

    @property
    def name(self) -> str:
        """The machine, with its ranks where they are known."""
        if not self.ranks:
            return f"machine {self.machine}"
        ranks = "rank" if len(self.ranks) == 1 else "ranks"
        return f"machine {self.machine} ({ranks} {', '.join(map(str, self.ranks))})"


class Heartbeat:
    """Exchanges beats with the other launchers while its `with` block runs.

    Args:
        snapshot: returns the ranks of this machine, and a sentence for each death.
        on_loss: called once, when another machine is the reason that the job must end.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        snapshot: Callable[[], tuple[list[int], list[str]]],
        on_loss: Callable[[], None],
    ):
        self._rendezvous, self._snapshot, self._on_loss = rendezvous, snapshot, on_loss
        self._own = Beat(socket.gethostname())
        self._beats: dict[int, tuple[Beat, float]] = {}  # of the others: number -> beat, when it was new
        self._store_is_gone = False
        self._ended = threading.Event()
        self._reported = False
        self._reason: str | None = None
        self._store: Any = None
        self._hosted_store: Any = None
        self._number = 0
        self._thread = threading.Thread(target=self._exchange, name="octavo-heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(2 * _INTERVAL)  # it may still be connecting

    def cause(self) -> str | None:
        """Why this machine's processes failed, if another machine is the reason; None otherwise.

        Waits up to `TIMEOUT_AFTER_FAILURE` seconds for that machine's report or silence.
        """
        began = time.monotonic()
        while self._store is not None and time.monotonic() - began < TIMEOUT_AFTER_FAILURE + _INTERVAL:
            found = self._cause(TIMEOUT_AFTER_FAILURE)
            all_answered = len(self._beats) == self._rendezvous.machines - 1 and all(
                heard > began + _INTERVAL for _, heard in self._beats.values()
            )
            if found is not None or all_answered:
                return found
            time.sleep(_INTERVAL / 2)
        return self._cause(TIMEOUT_AFTER_FAILURE)

    def over(self, reason: str | None, *, failed: bool) -> None:
        """Report that this machine's processes have ended, and the `reason` if it lies here. After a failure,
        wait until the others had time to read it.
        """
        self._reason = reason
        self._own = replace(self._own, over=True)
        if failed and self._store is not None and not self._store_is_gone:
            end = time.monotonic() + _STAYS_FOR
            while time.monotonic() < end and not self._all_over():
                time.sleep(_INTERVAL / 5)

    def _all_over(self) -> bool:
        return len(self._beats) == self._rendezvous.machines - 1 and all(
            beat.over for beat, _ in self._beats.values()
        )

    def _cause(self, silence: float) -> str | None:
        beats = list(self._beats.values())
        deaths = [f"{death} on {beat.machine}" for beat, _ in beats for death in beat.deaths]
        if deaths:
            return "; ".join(deaths)
        now = time.monotonic()
        silent = [beat for beat, heard in beats if not beat.over and now - heard > silence]
        if self._store_is_gone:
            silent = [beat for beat, _ in beats if self._hosts_store(beat) and not beat.over] or silent
            if not silent and not all(beat.over for beat, _ in beats):
                return f"the launcher that {self._rendezvous.host}:{self._rendezvous.port} belongs to is gone"
        if silent:
            return f"{' and '.join(beat.name for beat in silent)}: the launcher is gone"
        return None

    def _hosts_store(self, beat: Beat) -> bool:
        host, machine = (name.partition(".")[0] for name in (self._rendezvous.host, beat.machine))
        return len(self._beats) == 1 or machine == host

    def _exchange(self) -> None:
        try:
            store = self._connect(hosts=False)
            self._number = store.add(self._key("launchers"), 1)
            if self._may_host_store():
                with suppress(Exception):  # another launcher on this machine hosts it
                    self._hosted_store = self._connect(hosts=True)
        except Exception:  # torchrun cannot connect either, and reports it
            return
        self._store = store
        while True:
            try:
                self._send_and_receive()
            except Exception:
                # The connection is lost, and so is the launcher that hosts the store.
                if self._ended.is_set():
                    return
                self._store_is_gone = True
            if self._cause(TIMEOUT) is not None and not self._reported:
                self._reported = True
                self._on_loss()
            if self._store_is_gone or self._ended.wait(_INTERVAL):
                if not self._store_is_gone:
                    with suppress(Exception):
                        self._send_and_receive()
                return

    def _connect(self, *, hosts: bool) -> Any:
        """A client of the store. hosts: also host it while this launcher lives, even after torchrun has
        closed its own.
        """
        from torch.distributed import TCPStore

        return TCPStore(
            self._rendezvous.host,
            self._rendezvous.port,
            is_master=hosts,
            timeout=timedelta(seconds=self._rendezvous.timeout),
            wait_for_workers=False,
            multi_tenant=hosts,
        )

    def _may_host_store(self) -> bool:
        from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

        if self._rendezvous.number is not None:
            return self._rendezvous.number == 0
        return _matches_machine_hostname(self._rendezvous.host)

    def _send_and_receive(self) -> None:
        ranks, deaths = self._snapshot()
        if self._reason is not None:
            deaths = [self._reason]
        self._own = replace(self._own, beat=self._own.beat + 1, ranks=ranks, deaths=deaths)
        self._store.set(self._key(str(self._number)), json.dumps(asdict(self._own)))
        for number in range(1, self._rendezvous.machines + 1):
            key = self._key(str(number))
            if number == self._number or not self._store.check([key]):
                continue
            beat = Beat(**json.loads(self._store.get(key)))
            known = self._beats.get(number)
            if known is None or beat.beat != known[0].beat:
                self._beats[number] = beat, time.monotonic()

    def _key(self, name: str) -> str:
        return f"octavo/{self._rendezvous.job}/{name}"
