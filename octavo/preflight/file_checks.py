"""Checks of the files, folders, modules and programs that a job names, without torch."""

import importlib.machinery
import importlib.util
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from octavo.config import names
from octavo.config.schema import JobConfig
from octavo.core.errors import Problem, did_you_mean
from octavo.core.programs import missing_cxx, octavo_command, unquotable_path
from octavo.core.python_path import working_directory_last
from octavo.families import FAMILIES
from octavo.preflight import data_checks

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_STEP = re.compile(r"step-(\d+)")


def on_this_machine(job: JobConfig, gpus: int | None) -> Iterator[Problem]:
    """What is wrong with the files and programs that `job` needs on this machine."""
    for look, key in (
        (data_checks.dataset, "training.dataset"),
        (data_checks.validation, "validation.dataset"),
        (_tokenizer, "model.hf_assets_path"),
        (_outputs, "job.dump_folder"),
        (_load_step, "checkpoint.folder"),
        (_initial_load, "checkpoint.initial_load_path"),
    ):
        yield from on_disk(look, job, key)
    yield from _compiler(job, gpus)
    yield from _cpu_dtype()


def on_disk(look: Callable[[JobConfig], Iterator[Problem]], job: JobConfig, key: str) -> Iterator[Problem]:
    """`look(job)`, and a problem with `key` if the disk cannot be read."""
    try:
        yield from look(job)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~name of an unknown user
        yield job.problem(key, f": {getattr(error, 'strerror', None) or error}")


def custom_import(job: JobConfig) -> Iterator[Problem]:
    """Whether the module of experimental.custom_import is there; it is not imported."""
    module, key = job.experimental.custom_import, "experimental.custom_import"
    if not _MODULE.fullmatch(module):
        yield job.problem(key, "must be a dotted module name, like my_package.my_model")
    elif not _findable(module.split(".")):
        stem, _, ending = module.rpartition(".")
        if ending == "py":
            yield job.problem(key, f"must be a module's name, not its file's: {stem}")
        else:
            yield job.problem(key, f": no such module in {Path.cwd()} or on Python's path (see PYTHONPATH)")


def _findable(parts: Sequence[str]) -> bool:
    """Whether the module exists, without importing it or its parent packages."""
    try:
        with working_directory_last():
            spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return False
    for part in parts[1:]:
        if spec is None or spec.submodule_search_locations is None:
            return False
        # By its last name: for a dotted one in a folder without __init__.py, find_spec imports the parent.
        spec = importlib.machinery.PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec is not None


def _tokenizer(job: JobConfig) -> Iterator[Problem]:
    given = job.model.hf_assets_path
    path = Path(given).expanduser()
    found = path.is_file() or any((path / file).is_file() for file in _TOKENIZER_FILES)
    if given in names.TOKENIZERS or found:
        return
    if path.is_dir():
        wrong = f": the folder has none of {', '.join(_TOKENIZER_FILES)}"
    else:
        wrong = f": no such tokenizer{did_you_mean(given, names.TOKENIZERS)}"
    fetch = download_command(given)
    other = f"name a folder with tokenizer.json, or a shipped one: {', '.join(names.TOKENIZERS)}"
    if fetch is not None:
        yield job.problem("model.hf_assets_path", f"{wrong}; to fetch it", fetch, valid=True)
    else:
        yield job.problem("model.hf_assets_path", wrong, other)


def download_command(assets_path: str) -> str | None:
    """The command that downloads a tokenizer to `assets_path`; None if no shipped family has such a
    repository.
    """
    path = Path(assets_path)
    if path.suffix in (".json", ".model"):
        path = path.parent.parent if path.parent.name == "original" else path.parent
    owner = next((one.owner for one in FAMILIES.values() if one.repository.fullmatch(path.name)), None)
    if owner is None:
        return None
    folder = "" if path.parent == Path("assets/hf") else f" --local_dir {shlex.quote(str(path.parent))}"
    return f"{octavo_command()} download --repo_id {owner}/{path.name} --assets tokenizer{folder}"


def _outputs(job: JobConfig) -> Iterator[Problem]:
    key, remedy = "job.dump_folder", "name another folder"
    folder = Path(job.job.dump_folder).expanduser()
    there = (path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    existing = next(there)
    if not existing.exists():  # mkdir fails there, whatever the link points to
        yield job.problem(key, f": {existing} is a dead link", remedy)
        return
    if not existing.is_dir():
        what = "is a file" if existing == folder else f"lies below {existing}, which is a file"
        yield job.problem(key, what, remedy)
        return
    try:  # permissions do not suffice: a file system may be read-only, or accept no files at all, as /proc
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        yield job.problem(key, f": cannot write in {existing} ({error.strerror})", remedy)
    for key, active in (
        ("checkpoint.folder", job.checkpoint.enable),
        ("metrics.save_tb_folder", job.metrics.enable_tensorboard),
        ("profiling.save_traces_folder", job.profiling.enable_profiling),
    ):
        if active and (folder / job.get(key)).is_file():
            yield job.problem(key, f": {folder / job.get(key)} is a file", "name a folder")


def _load_step(job: JobConfig) -> Iterator[Problem]:
    step = job.checkpoint.load_step
    if not job.checkpoint.enable or step == -1:
        return
    folder = Path(job.job.dump_folder).expanduser() / job.checkpoint.folder
    complete = [path.name for path in folder.glob("step-*") if (path / "state.json").is_file()]
    steps = sorted(int(match[1]) for name in complete if (match := _STEP.fullmatch(name)))
    if step not in steps:
        there = f"has the steps {', '.join(map(str, steps))}" if steps else "has no complete checkpoint"
        yield job.problem("checkpoint.load_step", f": {folder} {there}")


def _initial_load(job: JobConfig) -> Iterator[Problem]:
    """Whether initial_load_path is of the stated kind; its content is read when the model is built."""
    own = Path(job.job.dump_folder).expanduser() / job.checkpoint.folder
    if job.checkpoint.initial_load_path is None or (job.checkpoint.enable and any(own.glob("step-*"))):
        return  # a run that resumes does not read it again
    folder, in_hf = Path(job.checkpoint.initial_load_path).expanduser(), job.checkpoint.initial_load_in_hf
    weights = any(folder.glob("*.safetensors"))
    if not folder.is_dir():
        what, remedy = ": no such folder", ""
    elif not weights and (folder / "params.json").is_file():
        what = "holds Meta's original files"
        remedy = f"octavo import {folder} --out FOLDER, and name that folder"
    elif weights and not in_hf:
        what, remedy = "is a Hugging Face folder", "add --checkpoint.initial_load_in_hf"
    elif in_hf and not weights:
        what = ": checkpoint.initial_load_in_hf = true, but no *.safetensors is in this folder"
        remedy = "leave the flag out for octavo's own checkpoints"
    else:
        return
    yield job.problem("checkpoint.initial_load_path", what, remedy)


def _compiler(job: JobConfig, gpus: int | None) -> Iterator[Problem]:
    """torch.compile generates C++ on a CPU, and would report what it lacks only in the first step."""
    if not job.compile.enable or gpus != 0:
        return
    if (unquotable := unquotable_path()) is not None:
        what, path = unquotable
        yield job.problem(
            "compile.enable",
            f": PyTorch cannot compile for a CPU where {what} has a space in it ({path})",
            "use a path without one, or leave compilation out (--compile.no-enable)",
        )
    if (compiler := missing_cxx()) is not None:
        yield job.problem(
            "compile.enable",
            f"needs a C++ compiler on a CPU, and {compiler or repr(compiler)} does not start",
            "install it (Debian, Ubuntu: apt install g++; macOS: xcode-select --install), name another one "
            "in CXX, or leave compilation out (--compile.no-enable)",
        )


def _cpu_dtype() -> Iterator[Problem]:
    asked = os.environ.get("OCTAVO_CPU_DTYPE", "")
    if asked not in ("", "float32", "bfloat16"):
        yield Problem(f"OCTAVO_CPU_DTYPE={asked}: expected float32 or bfloat16")
