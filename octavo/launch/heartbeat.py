"""What the launchers of several machines tell each other, so that each knows why a job ends.

Each launcher looks after the processes of its own machine. When one dies, the others' ranks wait for it: gloo
notices the broken connection, NCCL may wait until its timeout, and neither says who died or where. So the
launchers keep in touch, through the store that torchrun's rendezvous has opened at RDZV_ENDPOINT anyway:
every half second each writes who it is, how its processes fare and a number that grows, and reads the
others'.

A death told by another launcher ends the processes here as a death here would. So does a launcher that is
gone: the one that holds the store is missed at once, another one after `SILENT` seconds, since a machine may
well be busy for some. When the processes here have failed already, silence of `NAMED` seconds is enough to
name who is silent.
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

SILENT = 15.0
NAMED = 3.0
_EVERY = 0.5
_LINGERS = 3 * _EVERY


@dataclass(frozen=True)
class Meeting:
    """Where the launchers of a job meet: the store's address, the job's name, how many they are, and which of
    them this is, where they are numbered. Number 0 holds the store; without numbers, one on the host does.
    """

    host: str
    port: int
    job: str
    machines: int
    timeout: float
    number: int | None = None


@dataclass(frozen=True)
class Note:
    """The last word of one launcher.

    beat: grows with each word. ranks: of its processes. deaths: what it has to tell of those that died. over:
    its processes have ended, as it seems, for the same reason as everybody's.
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


class Peers:
    """Within `with`, this launcher is in touch with the others.

    Args:
        look: called for the ranks of this machine and what there is to tell of deaths.
        lost: called once, when another machine is the reason that the job must end.
    """

    def __init__(
        self, meeting: Meeting, look: Callable[[], tuple[list[int], list[str]]], lost: Callable[[], None]
    ):
        self._meeting, self._look, self._lost = meeting, look, lost
        self._mine = Note(socket.gethostname())
        self._notes: dict[int, tuple[Note, float]] = {}  # of the others: number -> note, when it was new
        self._holder_is_gone = False
        self._ended = threading.Event()
        self._told = False
        self._reason: str | None = None
        self._store: Any = None
        self._held: Any = None
        self._number = 0
        self._thread = threading.Thread(target=self._keep_in_touch, name="octavo-peers", daemon=True)

    def __enter__(self) -> "Peers":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(2 * _EVERY)  # it may still be connecting

    def cause(self) -> str | None:
        """Why this machine's processes failed, if another machine is the reason: waits up to `NAMED` seconds
        for its word, or for its silence.
        """
        began = time.monotonic()
        while self._store is not None and time.monotonic() - began < NAMED + _EVERY:
            found = self._cause(NAMED)
            everybody_spoke = len(self._notes) == self._meeting.machines - 1 and all(
                heard > began + _EVERY for _, heard in self._notes.values()
            )
            if found is not None or everybody_spoke:
                return found
            time.sleep(_EVERY / 2)
        return self._cause(NAMED)

    def over(self, reason: str | None, *, failed: bool) -> None:
        """Say that this machine's processes have ended, and the `reason` if it is to be found here. After a
        failure, stay until the others could read it.
        """
        self._reason = reason
        self._mine = replace(self._mine, over=True)
        if failed and self._store is not None and not self._holder_is_gone:
            end = time.monotonic() + _LINGERS
            while time.monotonic() < end and not self._all_over():
                time.sleep(_EVERY / 5)

    def _all_over(self) -> bool:
        return len(self._notes) == self._meeting.machines - 1 and all(
            note.over for note, _ in self._notes.values()
        )

    def _cause(self, silence: float) -> str | None:
        notes = list(self._notes.values())
        told = [f"{death} on {note.machine}" for note, _ in notes for death in note.deaths]
        if told:
            return "; ".join(told)
        now = time.monotonic()
        silent = [note for note, heard in notes if not note.over and now - heard > silence]
        if self._holder_is_gone:
            silent = [note for note, _ in notes if self._is_holder(note) and not note.over] or silent
            if not silent and not all(note.over for note, _ in notes):
                return f"the launcher that {self._meeting.host}:{self._meeting.port} belongs to is gone"
        if silent:
            return f"{' and '.join(note.name for note in silent)}: the launcher is gone"
        return None

    def _is_holder(self, note: Note) -> bool:
        return len(self._notes) == 1 or note.machine.partition(".")[0] == self._meeting.host.partition(".")[0]

    def _keep_in_touch(self) -> None:
        try:
            store = self._connect(holds=False)
            self._number = store.add(self._key("launchers"), 1)
            if self._may_hold():
                with suppress(Exception):  # it is another launcher on this machine that does
                    self._held = self._connect(holds=True)
        except Exception:  # torchrun could not meet there either, and says so
            return
        self._store = store
        while True:
            try:
                self._speak_and_listen()
            except Exception:
                # The store's connection is lost, and with it the launcher that holds it.
                if self._ended.is_set():
                    return
                self._holder_is_gone = True
            if self._cause(SILENT) is not None and not self._told:
                self._told = True
                self._lost()
            if self._holder_is_gone or self._ended.wait(_EVERY):
                if not self._holder_is_gone:
                    with suppress(Exception):
                        self._speak_and_listen()
                return

    def _connect(self, *, holds: bool) -> Any:
        """The store. holds: keep it open as long as this launcher lives, also when torchrun, whose own is the
        same, has left it.
        """
        from torch.distributed import TCPStore

        return TCPStore(
            self._meeting.host,
            self._meeting.port,
            is_master=holds,
            timeout=timedelta(seconds=self._meeting.timeout),
            wait_for_workers=False,
            multi_tenant=holds,
        )

    def _may_hold(self) -> bool:
        from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

        if self._meeting.number is not None:
            return self._meeting.number == 0
        return _matches_machine_hostname(self._meeting.host)

    def _speak_and_listen(self) -> None:
        ranks, deaths = self._look()
        if self._reason is not None:
            deaths = [self._reason]
        self._mine = replace(self._mine, beat=self._mine.beat + 1, ranks=ranks, deaths=deaths)
        self._store.set(self._key(str(self._number)), json.dumps(asdict(self._mine)))
        for number in range(1, self._meeting.machines + 1):
            key = self._key(str(number))
            if number == self._number or not self._store.check([key]):
                continue
            note = Note(**json.loads(self._store.get(key)))
            known = self._notes.get(number)
            if known is None or note.beat != known[0].beat:
                self._notes[number] = note, time.monotonic()

    def _key(self, name: str) -> str:
        return f"octavo/{self._meeting.job}/{name}"
