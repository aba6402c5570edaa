"""A checkout of octavo's shell scripts on a machine that exists only for a test.

The real scripts run, under a PATH that holds the few tools they need and nothing else. What takes minutes
or a network is played by stand-ins: a base Python whose `-m venv` makes an environment whose pip only writes
down what it was asked for, and packages `octavo` and `pytest` that print how they were started. `FAKE_INDEX`
says what the package index has: "cpu" builds of torch, only "cuda" ones, "none" at all, a "broken" answer to
everything else, or one that never comes ("hang").
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]

TOOLS = (
    *("awk", "bash", "cat", "cksum", "dirname", "env", "find", "flock", "grep", "ln", "ls", "mkdir", "mv"),
    *("readlink", "rm", "sed", "sleep", "uname"),
)

REPORT = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv[1:],
    "module": __spec__.name,
    "python": os.environ.get("FAKE_PYTHON"),
    "pid": os.getpid(),
    "cwd": os.getcwd(),
    "path": os.environ["PYTHONPATH"].split(":"),
    "threads": os.environ.get("OMP_NUM_THREADS"),
}))
sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
"""

# What `.venv/bin/python` is after the base Python below has made it.
VENV_PYTHON = """#!/usr/bin/env bash
set -eu
case "$*" in
  "-I -m pip install "*)
    shift 4
    printf '%s\\n' "$*" >>"$FAKE_PIP_LOG"
    case "$*" in
      *--editable*)
        if [[ $FAKE_INDEX == "broken" ]]; then echo "ERROR: no space left on device" >&2; exit 1; fi ;;
      *"torch=="*)
        if [[ $FAKE_INDEX == "hang" ]]; then : >"$FAKE_PIP_LOG.hangs"; exec sleep 60; fi
        if [[ $FAKE_INDEX == "none" ]]; then
          echo "ERROR: Could not find a version (from versions: none)" >&2
          echo "ERROR: No matching distribution found for torch" >&2
          exit 1
        fi
        if [[ $FAKE_INDEX == "cuda" && $* == *"==2.13.0+cpu" ]]; then
          echo "ERROR: Could not find a version (from versions: 2.13.0)" >&2
          echo "ERROR: No matching distribution found for torch==2.13.0+cpu" >&2
          exit 1
        fi ;;
    esac ;;
  *) FAKE_PYTHON=$0 exec REAL_PYTHON -S "$@" ;;
esac
"""

BASE_PYTHON = """#!/usr/bin/env bash
set -eu
if [[ $1 == -m && $2 == venv ]]; then
  mkdir -p "$3/bin"
  ln -s VENV_PYTHON "$3/bin/python"
else
  FAKE_PYTHON=$0 exec REAL_PYTHON -S "$@"
fi
"""


@dataclass
class Start:
    """How a script ended, and how the module it started was called, if one was."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, object]:
        return json.loads(self.out)


@dataclass
class Checkout:
    """The scripts in `root`, the tools in `tools`, and the variables that a start sees."""

    root: Path
    tools: Path
    environ: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def pip_calls(self) -> list[str]:
        log = Path(self.environ["FAKE_PIP_LOG"])
        return log.read_text().splitlines() if log.exists() else []

    def begin(
        self, script: str | Path = "run_train.sh", *args: str, cwd: Path | None = None, **environ: str
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(self.root / script), *args],
            cwd=cwd or self.root,
            env={**self.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def start(
        self, script: str | Path = "run_train.sh", *args: str, cwd: Path | None = None, **environ: str
    ) -> Start:
        process = self.begin(script, *args, cwd=cwd, **environ)
        out, err = process.communicate(timeout=LIMIT)
        return Start(process.returncode, out, err)

    def environment(self, name: str, packages: Mapping[str, str], modules: Sequence[str]) -> Path:
        """An environment of the user's own with these packages (name to version) and importable modules."""
        folder = self.root.parent / name
        site = folder / "site"
        for package, version in packages.items():
            metadata = site / f"{package}-{version}.dist-info" / "METADATA"
            metadata.parent.mkdir(parents=True)
            metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        for module in modules:
            (site / module).mkdir(parents=True)
            (site / module / "__init__.py").write_text("")
        _script(
            folder / "bin" / "python",
            '#!/usr/bin/env bash\nexport FAKE_PYTHON=$0 PYTHONPATH="'
            + str(site)
            + f'${{PYTHONPATH:+:$PYTHONPATH}}"\nexec "{sys.executable}" -S "$@"\n',
        )
        return folder


def make(folder: Path) -> Checkout:
    """A fresh checkout under `folder`, in a path with spaces."""
    root, tools = folder / "a check out", folder / "tools"
    (root / "scripts").mkdir(parents=True)
    for name in ("run_train.sh", "run_tests.sh", "scripts/python_env.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    for module in ("octavo/launch/__main__.py", "pytest/__main__.py"):
        (root / module).parent.mkdir(parents=True)
        (root / module).parent.joinpath("__init__.py").write_text("")
        (root / module).write_text(REPORT)
    tools.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, f"this test needs {tool}"
        (tools / tool).symlink_to(found)
    _script(folder / "venv-python", VENV_PYTHON)
    _script(tools / "python3.13", BASE_PYTHON.replace("VENV_PYTHON", f"'{folder / 'venv-python'}'"))
    return Checkout(
        root,
        tools,
        {
            "PATH": str(tools),
            "HOME": str(folder),
            "FAKE_INDEX": "cpu",
            "FAKE_PIP_LOG": str(folder / "pip.log"),
            "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
        },
    )


def _script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("REAL_PYTHON", f"'{sys.executable}'"))
    path.chmod(0o755)
