"""The job that a config describes: the steps that training would take before its first one."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from octavo import config, models
from octavo.commands.doctor import memory_checks
from octavo.commands.doctor.findings import Finding, Level, fail, note, ok
from octavo.config import ConfigError, JobConfig, names
from octavo.config.programs import download_command
from octavo.core.logging import count
from octavo.launch import launcher
from octavo.tokenizer import Tokenizer, build_tokenizer
from octavo.train import quantization
from octavo.train.build_model import model_args

_STATE_BYTES = 12  # a parameter in a checkpoint: float32 weight and the two moments of AdamW
_LEAST_FREE = 100e6  # metrics, traces and logs
# How a message begins what would help.
_REMEDIES = ("\nto fetch it:", "\ninstead:", "; name another folder", ": pip install ")
_PROBE = "The quick brown fox; 1, 2, 3 …"


def look(
    options: Sequence[str], gpus: int, estimate: memory_checks.MemoryEstimate | None
) -> Iterator[Finding]:
    """Judge the job of `options` as run_train.sh would, on `gpus` GPUs, then take its first steps. estimate:
    of its memory, if one was begun.
    """
    try:
        planned = launcher.plan(options, os.environ, gpus=gpus, cores=os.cpu_count() or 1)
        job = config.load(planned.options)
    except ConfigError as error:
        found = list(_problems("config", str(error)))
        yield from [*found, *_also_missing(options, gpus, found)]
        return
    yield ok("config", f"{job.job.config_file}: nothing wrong, for {count(planned.processes, 'process')}")
    yield from _job(job, gpus, estimate)


def _also_missing(options: Sequence[str], gpus: int, found: Sequence[Finding]) -> list[Finding]:
    """What is wrong with the job's values one by one, as far as they can be read, beyond what was `found`:
    one round is enough to learn of a misspelt key and of a tokenizer that is not there.
    """
    try:
        job = config.load(launcher.with_config_file(options, os.environ), problems=[])
        problems = list(_problems("config", "\n".join(config.each(job, gpus))))
    except (ConfigError, OSError, ValueError):  # of values that were told already
        return []
    told = {_key(finding) for finding in found}
    more: dict[str, Finding] = {}  # of one key, what is wrong with it first
    for finding in problems:
        more.setdefault(_key(finding), finding)
    if "model.hf_assets_path" not in more:
        _, tokenizer = _tokenizer(job)
        if tokenizer.level is not Level.OK:
            more["model.hf_assets_path"] = tokenizer
    return [finding for key, finding in more.items() if key not in told]


def _key(finding: Finding) -> str:
    """The key that a message about a value begins with."""
    return finding.told.split(" ", 1)[0]


def _problems(what: str, message: str) -> Iterator[Finding]:
    """A finding for each line; lines that are set in belong to the one before, and may hold its remedy."""
    told: list[str] = []
    for line in message.splitlines():
        if told and line.startswith(" "):
            told[-1] += f"\n{line.strip()}"
        else:
            told.append(line)
    for text in told:
        problem, remedy = text, ""
        for begin in _REMEDIES:
            if begin in text:
                problem, _, remedy = text.partition(begin)
                remedy = remedy if begin.endswith(":") else f"{begin.lstrip(':; ')}{remedy}"
        yield fail(what, problem, remedy.strip())


def _job(job: JobConfig, gpus: int, estimate: memory_checks.MemoryEstimate | None) -> Iterator[Finding]:
    tokenizer, finding = _tokenizer(job)
    yield finding
    if tokenizer is None:
        return
    yield ok("data", f"{job.training.dataset}: there")
    try:
        if job.experimental.custom_import:
            yield note(
                "model",
                f"experimental.custom_import = {job.experimental.custom_import} is not run here, so "
                "the model, its size and its memory are not looked at",
                "octavo estimate with the same options imports it and tells them",
            )
            return
        args = model_args(job, tokenizer)
        with torch.device("meta"):
            model = models.get(job.model.name).build(args)
    except ConfigError as error:
        yield from _problems("job", str(error))
        return
    size = sum(p.numel() for p in model.parameters())
    recipe = quantization.recipe_name(job.model.converters, job.float8)
    yield ok(
        "model",
        f"{job.model.name} {job.model.flavor}, {size:,} parameters, "
        + (f"float8 {recipe}" if recipe else "high precision"),
    )
    yield _disk(job, size)
    if estimate is not None:
        yield memory_checks.look(estimate, here=launcher.processes_wanted(os.environ, gpus), gpus=gpus)


def _tokenizer(job: JobConfig) -> tuple[Tokenizer | None, Finding]:
    """The job's tokenizer, tried out, if there is a sound one."""
    path = job.model.hf_assets_path
    try:
        tokenizer = build_tokenizer(path)
        length = len(tokenizer.encode(_PROBE, bos=False, eos=False))
    except ConfigError as error:
        fetch = download_command(path)
        shipped = f"name a folder with a sound one, or a shipped one: {', '.join(names.TOKENIZERS)}"
        return None, fail("tokenizer", str(error), fetch or shipped)
    return tokenizer, ok("tokenizer", f"{path}: {tokenizer.vocab_size:,} tokens, {length} in a probe")


def _disk(job: JobConfig, size: int) -> Finding:
    folder = Path(job.job.dump_folder).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    told = f"{free / 1e9:,.1f} GB free at {there}"
    if free < _LEAST_FREE:
        return fail("disk", told, "name another job.dump_folder, or free some space: metrics need it")
    if not job.checkpoint.enable:
        return ok("disk", told)
    # One complete checkpoint stays while the next is written.
    needed = 2 * _STATE_BYTES * size
    told += f", a checkpoint takes {_STATE_BYTES * size / 1e9:,.1f} GB"
    if needed > free:
        return fail("disk", told, "two must fit at a time: name another job.dump_folder, or free some space")
    kept = job.checkpoint.keep_latest_k
    if kept == 0 or (kept + 1) * _STATE_BYTES * size > free:
        many = f"{kept} of them" if kept else "all of them"
        return note("disk", told, f"checkpoint.keep_latest_k = {kept} keeps {many}, which may not fit")
    return ok("disk", told)
