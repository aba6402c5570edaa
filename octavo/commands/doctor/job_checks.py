"""Checks a job: validates its config and does what training does before its first step."""

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from octavo import config, models, preflight
from octavo.commands.doctor import memory_checks
from octavo.commands.doctor.findings import Finding, Level, fail, note, ok, problem
from octavo.config import ConfigError, JobConfig, names
from octavo.core.errors import Problem
from octavo.core.format import count
from octavo.launch import launcher
from octavo.preflight.file_checks import download_command
from octavo.tokenizer import Tokenizer, build_tokenizer
from octavo.train import quantization
from octavo.train.build_model import model_args

_STATE_BYTES = 12  # per parameter in a checkpoint: the float32 weight and AdamW's two moments
_MIN_FREE = 100e6  # bytes for metrics, traces and logs
_PROBE = "The quick brown fox; 1, 2, 3 …"


def check_job(
    options: Sequence[str], gpus: int, estimate: memory_checks.MemoryEstimate | None
) -> Iterator[Finding]:
    """Validate the job of `options` as run_train.sh would on `gpus` GPUs, then prepare it as training would.

    estimate: of its memory, if one was started.
    """
    try:
        planned = launcher.plan(options, os.environ, gpus=gpus, cores=launcher.usable_cores())
        job = config.load(planned.options)
    except ConfigError as error:
        yield from (problem("config", found) for found in error.problems)
        yield from _further_problems(options, gpus, {found.key for found in error.problems})
        return
    yield ok("config", f"{job.job.config_file}: valid, for {count(planned.processes, 'process')}")
    yield from _check_model(job, gpus, estimate)


def _further_problems(options: Sequence[str], gpus: int, reported: Collection[str]) -> list[Finding]:
    """Validate the job's values one by one, as far as they can be parsed, and return problems with other keys
    than those `reported`. So one run reports both a misspelt key and a missing tokenizer.
    """
    try:
        job = config.load(launcher.with_config_file(options, os.environ), problems=[])
        found = [problem("config", each) for each in preflight.each(job, gpus)]
    except (ConfigError, OSError, ValueError):  # of values that are reported already
        return []
    by_key: dict[str, Finding] = {}  # the first problem of each key
    for finding in found:
        by_key.setdefault(finding.key or finding.message, finding)
    if "model.hf_assets_path" not in by_key:
        _, tokenizer = _check_tokenizer(job)
        if tokenizer.level is not Level.OK:
            by_key["model.hf_assets_path"] = tokenizer
    return [finding for key, finding in by_key.items() if key not in reported]


def _check_model(
    job: JobConfig, gpus: int, estimate: memory_checks.MemoryEstimate | None
) -> Iterator[Finding]:
    tokenizer, finding = _check_tokenizer(job)
    yield finding
    if tokenizer is None:
        return
    yield ok("data", f"{job.training.dataset}: exists")
    if job.experimental.custom_import:
        yield note(
            "model",
            f"experimental.custom_import = {job.experimental.custom_import} is not imported here, so the "
            "model, its size and its memory are not checked",
            "octavo estimate with the same options imports it and reports them",
        )
        return
    try:
        args = model_args(job, tokenizer)
        with torch.device("meta"):
            model = models.get(job.model.name).build(args)
    except ConfigError as error:
        yield from (problem("job", found) for found in error.problems)
        return
    parameters = sum(p.numel() for p in model.parameters())
    recipe = quantization.recipe_name(job.model.converters, job.float8)
    yield ok(
        "model",
        f"{job.model.name} {job.model.flavor}, {parameters:,} parameters, "
        + (f"float8 {recipe}" if recipe else "high precision"),
    )
    yield _check_disk(job, parameters)
    if estimate is not None:
        processes = launcher.processes_wanted(os.environ, gpus)
        yield memory_checks.check_memory(estimate, processes=processes, gpus=gpus)


def _check_tokenizer(job: JobConfig) -> tuple[Tokenizer | None, Finding]:
    """Open the job's tokenizer and encode a sentence; the tokenizer is None if that fails."""
    path = job.model.hf_assets_path
    try:
        tokenizer = build_tokenizer(path)
        length = len(tokenizer.encode(_PROBE, bos=False, eos=False))
    except ConfigError as error:
        shipped = f"name a folder with a valid one, or a shipped one: {', '.join(names.TOKENIZERS)}"
        key, fetch = "model.hf_assets_path", download_command(path)
        where = job.where.get(key, "")
        found = Problem(str(error), fetch or shipped, key, where, valid=fetch is not None)
        return None, problem("tokenizer", found)
    message = f"{path}: {tokenizer.vocab_size:,} tokens; encodes a test sentence as {length}"
    return tokenizer, ok("tokenizer", message)


def _check_disk(job: JobConfig, parameters: int) -> Finding:
    folder = Path(job.job.dump_folder).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    message = f"{free / 1e9:,.1f} GB free at {existing}"
    if free < _MIN_FREE:
        return fail("disk", message, "name another job.dump_folder, or free some space: metrics need it")
    if not job.checkpoint.enable:
        return ok("disk", message)
    checkpoint = _STATE_BYTES * parameters
    message += f", a checkpoint takes {checkpoint / 1e9:,.1f} GB"
    if 2 * checkpoint > free:  # a complete checkpoint is kept while the next one is written
        return fail("disk", message, "two must fit: name another job.dump_folder, or free some space")
    kept = job.checkpoint.keep_latest_k
    if kept == 0 or (kept + 1) * checkpoint > free:
        many = f"{kept} of them" if kept else "all of them"
        return note("disk", message, f"checkpoint.keep_latest_k = {kept} keeps {many}, which may not fit")
    return ok("disk", message)
