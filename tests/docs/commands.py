"""Reads the shell commands of a Markdown page, and runs them in a folder that looks like a checkout."""

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
    """The commands in the page's bash blocks, one line each, without comments."""
    commands: list[str] = []
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        joined = block.replace("\\\n", " ")
        lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines())
        commands += [re.sub(r"\s+", " ", line) for line in lines if line]
    return commands


def files_of(page: Path) -> dict[str, str]:
    """File name -> content, for each code block with a title."""
    blocks = re.findall(
        r'^```\w+ title="([^"]+)"\n(.*?)^```', page.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    return dict(blocks)


@dataclass(frozen=True)
class Reduced:
    """A command run with less work: `replaced` texts, then `appended` flags.

    cold: start a new Python; otherwise fork one that has imported torch already (`tests.helpers.warm`).
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
    """A command that is not run here because of `reason`; `tests` is the file that runs it or a stand-in."""

    reason: str
    tests: str


def checkout(folder: Path) -> Path:
    """Make `folder` look like a checkout after set-up: scripts, package, `.venv/bin`, and texts in `data`."""
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
    for part in range(20):  # each file is a document; some are held out for validation
        size = len(corpus) // 20
        (texts / f"{part}.txt").write_text(corpus[part * size : (part + 1) * size])
    (folder / "data" / "other.txt").write_text(corpus[:60_000])
    return folder


def run(command: str, folder: Path, variables: dict[str, str], python: str) -> None:
    """Run `command` by bash in `folder`. An assignment alone goes to `variables`, for later commands."""
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
