"""The programs that a job needs besides Python, and how to call our own: what a message can tell to run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def octavo_command() -> str:
    """How to call `octavo` from a shell in the working directory, with the environment that runs now.

    Its script is on PATH in an activated environment, beside the interpreter in another, and nowhere where
    octavo is imported from a checkout without having been installed.
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


_LLAMA = re.compile(r"(Meta-)?Llama-\d(\.\d)?-\d+B(-\w+)*", re.IGNORECASE)


def download_command(assets_path: str) -> str | None:
    """The command that would put a tokenizer at `assets_path`; None where the path does not name one of
    Meta's repositories.
    """
    path = Path(assets_path)
    if path.suffix in (".json", ".model"):
        path = path.parent.parent if path.parent.name == "original" else path.parent
    if _LLAMA.fullmatch(path.name) is None:
        return None
    folder = "" if path.parent == Path("assets/hf") else f" --local_dir {shlex.quote(str(path.parent))}"
    return f"{octavo_command()} download --repo_id meta-llama/{path.name} --assets tokenizer{folder}"


def missing_cxx() -> str | None:
    """The C++ compiler that torch.compile would call on a CPU, if it does not start; None if all is well.

    Inductor takes $CXX, else g++ (clang++ on macOS), and no other; or fetches one if it is told to.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if sys.platform == "linux" and os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        return None
    try:
        subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return compiler
    return None


def _shell(path: Path) -> str:
    """A path for a shell's command line: relative where that is shorter."""
    relative = os.path.relpath(path)
    shorter = relative if len(relative) < len(str(path)) and not relative.startswith("..") else str(path)
    return shlex.quote(shorter if os.sep in shorter or shorter == "." else f".{os.sep}{shorter}")
