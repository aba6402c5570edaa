"""What a field of `schema.py` says of its option in `Annotated`, beside type, default and help: frozen data.

    interval: Annotated[Positive, needs.CHECKPOINTS, needs.SAVES] = 500

`options_of` reads the fields. All else that knows about options is derived from what it returns: reading
flags and files (`flags.py`, `toml.py`), the checks (`option_checks.py`), the help and the reference page
(`option_help.py`), and which settings may differ between runs whose losses are compared.
"""

import dataclasses
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

Note = TypeVar("Note")


@dataclass(frozen=True)
class NeedsGpu:
    """These values need a GPU."""

    values: tuple[Any, ...] = (True,)


@dataclass(frozen=True)
class NeedsPackage:
    """These values need `package`, which pip installs from `source`."""

    package: str
    source: str = "'octavo[train]'"
    values: tuple[Any, ...] = (True,)


@dataclass(frozen=True)
class ChangesLoss:
    """Whether runs that differ in this option alone can have other losses. Without it, they can."""

    changes: bool


SAME_LOSS, OTHER_LOSS = ChangesLoss(False), ChangesLoss(True)


@dataclass(frozen=True)
class HelpNames:
    """What `{names}` stands for in the option's help: names that are stated elsewhere."""

    names: str


@dataclass(frozen=True)
class AlsoSpelled:
    """A second spelling of the option, as "section.key"."""

    name: str


@dataclass(frozen=True)
class ValueSpelled:
    """A second spelling of a value."""

    other: str
    value: str

    def translate(self, given: Any) -> Any:
        """`given`, one value or several, with the first spelling for the second."""
        if isinstance(given, str):
            return ",".join(self.translate(given.split(",")))
        if isinstance(given, list):
            return [self.value if str(part).strip() == self.other else part for part in given]
        return given


@dataclass(frozen=True)
class Option:
    """One option: its type and default, and what its section and its field note, in this order."""

    section: str
    key: str
    kind: Any
    default: Any
    notes: tuple[Any, ...]

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"

    def noted(self, kind: type[Note]) -> list[Note]:
        """The notes of one kind, for example all its ranges."""
        return [note for note in self.notes if isinstance(note, kind)]

    @property
    def changes_loss(self) -> bool:
        return [True, *(note.changes for note in self.noted(ChangesLoss))][-1]

    @property
    def aliases(self) -> list[tuple[str, str]]:
        """Its other spellings, each as (section, key)."""
        return [(section, key) for note in self.noted(AlsoSpelled) for section, key in [note.name.split(".")]]


def options_of(job_type: type) -> Iterator[Option]:
    """The options of a dataclass whose fields are sections, in their order."""
    for section, hint in get_type_hints(job_type, include_extras=True).items():
        section_type, of_section = _split(hint)
        hints, defaults = get_type_hints(section_type, include_extras=True), section_type()
        for field in dataclasses.fields(section_type):
            kind, notes = _split(hints[field.name])
            yield Option(section, field.name, kind, getattr(defaults, field.name), (*of_section, *notes))


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its annotations, and these, from the inside out."""
    if get_origin(hint) is Annotated:
        kind, notes = _split(hint.__origin__)
        return kind, (*notes, *hint.__metadata__)
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = [arm for arm in get_args(hint) if arm is not type(None)]
        kind, notes = _split(inner)
        return kind | None, notes
    return hint, ()
