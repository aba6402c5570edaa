"""The results of checks."""

from dataclasses import dataclass
from enum import Enum

from octavo.core.errors import Problem


class Level(Enum):
    """NOTE: works, with a limitation. WARN: training starts, but is expected to fail. FAIL: training would
    not start, or would be wrong.
    """

    OK = "ok"
    NOTE = "note"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """The result of one check. `remedy` is a command or a sentence, empty if nothing needs to be done. `key`
    and `where`: the option at fault and how it was given, if one is; `valid`: see `Problem`.
    """

    level: Level
    subject: str
    message: str
    remedy: str = ""
    key: str = ""
    where: str = ""
    valid: bool = False

    def __str__(self) -> str:
        first, *rest = self.message.splitlines() or [""]
        lines = [f"  {self.level.value:<5} {self.subject:<12} {first}", *(f"{'':21}{line}" for line in rest)]
        if self.remedy:
            lines.append(f"{'':21}-> {self.remedy}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, str]:
        return {
            "level": self.level.value,
            "what": self.subject,
            "told": self.message,
            "remedy": self.remedy,
            **({"key": self.key, "where": self.where} if self.key else {}),
        }


def ok(subject: str, message: str) -> Finding:
    return Finding(Level.OK, subject, message)


def note(subject: str, message: str, remedy: str = "") -> Finding:
    return Finding(Level.NOTE, subject, message, remedy)


def fail(subject: str, message: str, remedy: str = "") -> Finding:
    return Finding(Level.FAIL, subject, message, remedy)


def problem(subject: str, found: Problem) -> Finding:
    """A failure, for a problem of the configuration."""
    return Finding(
        Level.FAIL, subject, found.message, found.remedy, key=found.key, where=found.where, valid=found.valid
    )
