"""What users read about options, derived from the fields of `schema.py`: `--help`, and the reference page.

python -m octavo.config.option_help > docs/options.md
"""

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterator

from octavo.config import schema
from octavo.config.needs import Needs
from octavo.config.options import AlsoSpelled, HelpNames, Option
from octavo.config.ranges import Range
from octavo.config.schema import OPTIONS, SECTIONS
from octavo.config.values import describe, metavar, shown, unwrap

_DESCRIPTION = (
    "Train a model. Values come from the command line, then from the TOML file (--job.config_file), "
    "then from the defaults below. Booleans are flags (--training.compile, --training.no-compile); lists are "
    "comma-separated; - and _ are the same."
)
_WIDEST = 110

_PAGE = """\
# Options

Every option of a training job. In a TOML file, `seq_len` of the section `[training]` is written

```toml
[training]
seq_len = 2048
```

and on the command line `--training.seq_len 2048`; flags override the file. `./run_train.sh --help` prints
this list, too. A flag that would have no effect is an error; the same setting in a file is ignored. The page
is made from `octavo/config/schema.py` by `python -m octavo.config.option_help`.
"""


def texts() -> dict[str, str]:
    """section.key -> its help: the string below its field."""
    class_of = {name: section for section, name in _section_classes()}
    found = {}
    for part in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(part, ast.ClassDef) or part.name not in class_of:
            continue
        for field, below in zip(part.body, part.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                name = f"{class_of[part.name]}.{field.target.id}"
                found[name] = " ".join(str(ast.literal_eval(below.value)).split())
                for note in OPTIONS[name].noted(HelpNames):
                    found[name] = found[name].replace("{names}", note.names)
    return found


def _section_classes() -> Iterator[tuple[str, str]]:
    job = schema.JobConfig()
    return ((section, type(getattr(job, section)).__name__) for section in SECTIONS)


def help_text(prog: str) -> str:
    """What `--help` prints: every section and key with its values, default and help."""
    width, text_of = min(shutil.get_terminal_size((_WIDEST, 0)).columns, _WIDEST), texts()
    parts = [f"usage: {prog} [--section.key value ...]", "", textwrap.fill(_DESCRIPTION, width)]
    for section in (section for section, keys in SECTIONS.items() if keys):
        parts += ["", f"{section}:"]
        for option in _of(section):
            both = f"--{option.name}, --{section}.no_{option.key}"
            parts.append(f"  {both if option.kind is bool else f'--{option.name} {metavar(option.kind)}'}")
            text = f"{text_of[option.name]} (default: {_default(option)})"
            parts.append(textwrap.fill(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return "\n".join(parts) + "\n"


def page() -> str:
    """The reference page, in Markdown."""
    parts, text_of = [_PAGE], texts()
    for section in (section for section, keys in SECTIONS.items() if keys):
        parts.append(f"## {section}\n")
        parts += [f"- {_entry(option, text_of[option.name])}" for option in _of(section)]
        parts.append("")
    return "\n".join(parts)


def _entry(option: Option, text: str) -> str:
    facts = [describe(option.kind)]
    facts += [note.must for note in option.noted(Range) if unwrap(option.kind)[0] in (int, float)]
    facts += [f"also `{note.name}`" for note in option.noted(AlsoSpelled)]
    entry = f"**`{option.name}`** = `{_default(option) or ' '}`. {text} *{'; '.join(facts)}.*"
    needs = " or ".join(need.why for need in option.noted(Needs))
    return f"{entry} No effect if {needs}." if needs else entry


def _of(section: str) -> Iterator[Option]:
    return (option for option in OPTIONS.values() if option.section == section)


def _default(option: Option) -> str:
    return shown(option.default)


if __name__ == "__main__":
    print(page(), end="")
