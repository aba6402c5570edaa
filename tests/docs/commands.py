"""The shell commands of a Markdown page, and a folder in which they can be run as a reader would run them."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.launching import small_corpus
from tests.helpers.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]

# Few tokens, a short text and two steps.
SMALL = (
    "--training.steps=2 --training.seq_len=64 --training.local_batch_size=1 "
    "--lr_scheduler.warmup_steps=1 --metrics.log_freq=1 --training.mixed_precision_param=float32"
)


def commands_of(page: Path) -> list[str]:
    """The commands in the page's blocks of bash, one line each, without comments and without prompts."""
    found: list[str] = []
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        whole = block.replace("\\\n", " ")
        lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in whole.splitlines())
        found += [re.sub(r"\s+", " ", line) for line in lines if line]
    return found


def files_of(page: Path) -> dict[str, str]:
    """The files that the page shows whole, by name: blocks with a title."""
    blocks = re.findall(
        r'^```\w+ title="([^"]+)"\n(.*?)^```', page.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    return dict(blocks)


@dataclass(frozen=True)
class Shrunk:
    """How a command is made small: texts to replace, then what to append; and whether Python itself starts it
    (`tests.helpers.warm` otherwise).
    """

    replaced: tuple[tuple[str, str], ...] = ()
    appended: str = ""
    cold: bool = False

    def __call__(self, command: str) -> str:
        for old, new in self.replaced:
            assert old in command, f"{old!r} is not in: {command}"
            command = command.replace(old, new)
        return f"{command} {self.appended}".strip()


@dataclass(frozen=True)
class Elsewhere:
    """A command that is not run here; `why`, and the file whose tests run it, or run it with a stand-in."""

    why: str
    tests: str


def checkout(folder: Path) -> Path:
    """`folder` made to look like a checkout whose set-up is done: the scripts, the package, `.venv/bin`."""
    for name in ("run_train.sh", "run_tests.sh", "octavo", "examples", "benchmarks", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, arguments in (("octavo", "-m octavo.cli"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "$OCTAVO_PYTHON" {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    texts = folder / "data" / "texts"
    texts.mkdir(parents=True)
    corpus = small_corpus().read_text()
    for part in range(20):  # each file is a document, and some are to be held out
        size = len(corpus) // 20
        (texts / f"{part}.txt").write_text(corpus[part * size : (part + 1) * size])
    (folder / "data" / "other.txt").write_text(corpus[:60_000])
    return folder


def run(command: str, folder: Path, variables: dict[str, str], python: str) -> None:
    """Run `command` by bash in `folder`; an assignment alone is kept in `variables` for the next ones."""
    assignment = re.fullmatch(r"(\w+)=(\S+)", command)
    if assignment:
        variables[assignment[1]] = assignment[2]
        return
    environment = {**os.environ, "OCTAVO_PYTHON": python, "PYTHONPATH": str(ROOT)}
    shell = "".join(f"{name}={value}; " for name, value in variables.items())
    done = subprocess.run(
        ["bash", "-c", f"set -eu; {shell}{command}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, f"{command}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
