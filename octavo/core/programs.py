"""Programs that a job needs besides Python, and commands that messages suggest."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def octavo_command() -> str:
    """The command that calls `octavo` from a shell in the working directory, in the current environment.

    The console script is on PATH in an activated environment, and beside the interpreter otherwise. A
    checkout that was not installed has none.
    """
    bin_folder = Path(sys.executable).absolute().parent
    on_path = shutil.which("octavo")
    if on_path and Path(os.path.realpath(on_path)).parent == bin_folder.resolve():
        return "octavo"
    if os.access(bin_folder / "octavo", os.X_OK):
        return _shell(bin_folder / "octavo")
    root = Path(__file__).parents[2]
    module = f"{_shell(Path(sys.executable).absolute())} -m octavo.cli"
    if root == Path.cwd() or root.name in ("site-packages", "dist-packages"):
        return module  # `-m` finds it there by itself
    return f"PYTHONPATH={_shell(root)} {module}"


def missing_cxx() -> str | None:
    """The C++ compiler that torch.compile would call on a CPU, if it does not start; None if it does.

    Inductor uses $CXX, else g++ (clang++ on macOS); it can also install one, if a variable asks for that.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if sys.platform == "linux" and os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        return None
    try:
        subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return compiler
    return None


def unquotable_path() -> tuple[str, str] | None:
    """(what it is, the path) of a path with a space that torch.compile writes without quotes into the command
    line of the C++ compiler; None if there is none.
    """
    paths = (
        ("TMPDIR", tempfile.gettempdir()),
        ("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")),
        ("the Python environment", sys.prefix),
    )
    return next((pair for pair in paths if any(map(str.isspace, pair[1]))), None)


def _shell(path: Path) -> str:
    """A path quoted for a shell, relative if that is shorter."""
    relative = os.path.relpath(path)
    shorter = relative if len(relative) < len(str(path)) and not relative.startswith("..") else str(path)
    return shlex.quote(shorter if os.sep in shorter or shorter == "." else f".{os.sep}{shorter}")
