"""What was found: plain data, and how it is shown."""

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How much a finding matters. NOTE: works, but know it. WARN: starts, but is not expected to get far.
    FAIL: training would not start, or be wrong.
    """

    OK = "ok"
    NOTE = "note"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `remedy` is a command or a sentence, empty where nothing need be done."""

    level: Level
    what: str
    told: str
    remedy: str = ""

    def __str__(self) -> str:
        first, *rest = self.told.splitlines() or [""]
        lines = [f"  {self.level.value:<5} {self.what:<12} {first}", *(f"{'':21}{line}" for line in rest)]
        if self.remedy:
            lines.append(f"{'':21}-> {self.remedy}")
        return "\n".join(lines)


def ok(what: str, told: str) -> Finding:
    return Finding(Level.OK, what, told)


def note(what: str, told: str, remedy: str = "") -> Finding:
    return Finding(Level.NOTE, what, told, remedy)


def warn(what: str, told: str, remedy: str = "") -> Finding:
    return Finding(Level.WARN, what, told, remedy)


def fail(what: str, told: str, remedy: str = "") -> Finding:
    return Finding(Level.FAIL, what, told, remedy)
