"""Checks whether a job can run here, before torch is imported and before any process is started.

`load` has checked names and types; `check` checks values: ranges, arithmetic, paths, and flags that would
have no effect. Checks that need the data, the model or the device (does the corpus fill one batch? does the
filter match a layer?) come later.
"""

import importlib.machinery
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from octavo.config import data_checks, layer_recipes, names
from octavo.config.effects import fuses, uses_previous_step, without_effect
from octavo.config.parallel_dims import ParallelDims, parallel_dims_of
from octavo.config.pipeline_plan import plan_of
from octavo.config.pipeline_plan import problems as pipeline_problems
from octavo.config.programs import download_command, missing_cxx
from octavo.config.ranges import get, named, out_of_range
from octavo.config.schema import JobConfig
from octavo.config.sizes import args_of, shared_sizes, undivided, units
from octavo.core.errors import ConfigError, did_you_mean
from octavo.core.python_path import working_directory_last

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_STEP = re.compile(r"step-(\d+)")


def check(job: JobConfig, *, world_size: int, gpus: int | None = None, elsewhere: bool = False) -> None:
    """Check a loaded job for `world_size` processes on a machine with `gpus` GPUs (None: unknown).

    `elsewhere`: the job will run on another machine, so files, packages and compilers are not checked.

    Raises:
        ConfigError: with one line for each thing wrong.
    """
    problems = out_of_range(job)
    if not problems:  # the other checks calculate with the values
        problems = [
            *_layout(job, world_size),
            *_on_disk(_pipeline, job, "parallelism.pipeline_parallel_schedule_csv"),
            *_warmup(job),
            *_model(job),
            *_float8(job),
            *_fuse(job),
            *_chunked_loss(job),
            *_optimizer(job, world_size),
            *_health(job),
            *_gpu_only(job, gpus),
            *_rotation(job, gpus),
            *_offload(job, world_size),
            *_rewind(job),
            *_seed(job, world_size),
            *([] if elsewhere else _here(job, gpus)),
        ]
    problems += without_effect(job, world_size)
    if problems:
        raise ConfigError("\n".join(problems))


def each(job: JobConfig, gpus: int | None) -> list[str]:
    """One message for each wrong value of `job` that can be checked alone, whatever else is wrong."""
    problems = [*out_of_range(job), *_here(job, gpus)]
    if "model.name" in job.given:  # a flavor is one of a model, which may be what could not be read
        problems += _model(job)
    return problems


def _here(job: JobConfig, gpus: int | None) -> Iterator[str]:
    """What is wrong with the files, packages and programs that `job` needs on this machine, a line each."""
    yield from _on_disk(data_checks.dataset, job, "training.dataset")
    yield from _on_disk(data_checks.validation, job, "validation.dataset")
    yield from _on_disk(_tokenizer, job, "model.hf_assets_path")
    yield from _on_disk(_outputs, job, "job.dump_folder")
    yield from _on_disk(_load_step, job, "checkpoint.folder")
    yield from _on_disk(_initial_load, job, "checkpoint.initial_load_path")
    yield from _compiler(job, gpus)
    yield from _packages(job)
    yield from _cpu_dtype()


def notes(job: JobConfig) -> list[str]:
    """Sentences for the log about settings that are allowed but may surprise."""
    warmup, steps = job.lr_scheduler.warmup_steps, job.training.steps
    if warmup > steps:
        return [
            f"lr_scheduler.warmup_steps = {warmup} exceeds training.steps = {steps}: every step is warm-up"
        ]
    overlap = _overlap(job)
    return [f"{overlap}: the decay begins after warm-up instead"] if overlap else []


def _overlap(job: JobConfig) -> str | None:
    """Describes warm-up and decay, if together they take more than all steps."""
    warmup, steps, ratio = job.lr_scheduler.warmup_steps, job.training.steps, job.lr_scheduler.decay_ratio
    if ratio is None or warmup >= steps or warmup + (decay := round(steps * ratio)) <= steps:
        return None
    return (
        f"lr_scheduler.warmup_steps = {warmup} and lr_scheduler.decay_ratio = {ratio:g} ({decay} steps) "
        f"overlap in training.steps = {steps}"
    )


def _on_disk(look: Callable[[JobConfig], Iterator[str]], job: JobConfig, key: str) -> Iterator[str]:
    """`look(job)`, and a message about `key` if the disk cannot be read."""
    try:
        yield from look(job)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~name of an unknown user
        yield f"{named(job, key)}: {getattr(error, 'strerror', None) or error}"


def _layout(job: JobConfig, world_size: int) -> Iterator[str]:
    try:
        layout = parallel_dims_of(job.parallelism, world_size)
    except ConfigError as error:
        yield str(error)
        return
    yield from _batch(job, layout)
    args = args_of(job)
    too_many = list(undivided(shared_sizes(args), layout.tensor)) if args else []
    yield from too_many or _sequence(job, layout)


def _pipeline(job: JobConfig) -> Iterator[str]:
    """Errors in the pipeline's settings, and in its stages if octavo ships the model."""
    problems = list(pipeline_problems(job))
    args = args_of(job)
    if not problems and args and job.parallelism.pipeline_parallel_degree > 1:
        try:
            plan_of(job, units(args))
        except ConfigError as error:
            problems = [str(error)]
    yield from problems


def _batch(job: JobConfig, layout: ParallelDims) -> Iterator[str]:
    total, local = job.training.global_batch_size, job.training.local_batch_size
    one_pass = local * layout.data
    if total == -1 or total % one_pass == 0:
        return
    below = total // one_pass * one_pass
    fitting = f"{below} or {below + one_pass}" if below else str(one_pass)
    who = "processes" if layout.context == layout.tensor == 1 else "data parallel groups"
    yield (
        f"{named(job, 'training.global_batch_size')} is not a multiple of local_batch_size x {who} = "
        f"{local} x {layout.data} = {one_pass}; {fitting} would be, or change local_batch_size"
    )


def _sequence(job: JobConfig, layout: ParallelDims) -> Iterator[str]:
    multiple = layout.sequence_multiple
    for key in ("training.seq_len", "validation.seq_len"):
        length = get(job, key)
        if length is not None and length % multiple:
            terms = [f"tensor_parallel_degree = {layout.tensor}"] if layout.tensor > 1 else []
            terms += [f"2 x context_parallel_degree = {2 * layout.context}"] if layout.context > 1 else []
            below = length // multiple * multiple
            yield (
                f"{named(job, key)} must be a multiple of {' times '.join(terms)}, so that the devices "
                f"get equal parts; {f'{below} or ' if below else ''}{below + multiple} would be"
            )


def _warmup(job: JobConfig) -> Iterator[str]:
    """A warm-up longer than the run. Only one given by flag is refused, because a short trial of a long job
    is no mistake; see `notes`.
    """
    key, steps = "lr_scheduler.warmup_steps", job.training.steps
    if job.given.get(key) == "cli" and job.lr_scheduler.warmup_steps > steps:
        yield f"{named(job, key)} exceeds training.steps = {steps}; optimizer.lr would not be reached"
    given = [job.given.get(name) for name in (key, "lr_scheduler.decay_ratio")]
    if "cli" in given and None not in given and (overlap := _overlap(job)):
        yield f"{overlap}; lower one of the two"


def _model(job: JobConfig) -> Iterator[str]:
    name, flavor = job.model.name, job.model.flavor
    if job.experimental.custom_import:  # it may register other names
        yield from _custom_import(job)
    elif name not in names.MODELS:
        hint = did_you_mean(name, names.MODELS)
        yield f"{named(job, 'model.name')}: no such model; known: {', '.join(names.MODELS)}{hint}"
    elif flavor not in names.MODELS[name]:
        flavors = names.MODELS[name]
        hint = did_you_mean(flavor, flavors)
        yield f"{named(job, 'model.flavor')}: {name} has no such flavor; it has {', '.join(flavors)}{hint}"


def _float8(job: JobConfig) -> Iterator[str]:
    patterns = f"{layer_recipes.KEY} ({job.where.get(layer_recipes.KEY, 'the default')})"
    problems = [f"{patterns}: {message}" for message in layer_recipes.wrong(job.float8)]
    yield from problems
    recipe = job.float8.recipe_name or names.GATHERABLE_RECIPES[0]
    wanted = "float8" in job.model.converters and job.float8.enable_fsdp_float8_all_gather and not problems
    if wanted and not set(layer_recipes.recipes_named(job.float8)) & set(names.GATHERABLE_RECIPES):
        yield (
            f"{named(job, 'float8.enable_fsdp_float8_all_gather')}: the recipe {recipe} casts a weight "
            "differently for the output and for grad_input, so no single float8 weight can be gathered; set "
            f"float8.recipe_name = {' or '.join(names.GATHERABLE_RECIPES)}, or gather in high precision"
        )


def _fuse(job: JobConfig) -> Iterator[str]:
    if job.model.fuse == "on" and uses_previous_step(job):
        yield (
            f"{named(job, 'model.fuse')}: fused layers cast with the maxima of the current step, and the "
            f"recipe {names.PREVIOUS_STEP_RECIPES[0]} with those of the previous one; leave it at auto, "
            "which then calls the modules one by one, or choose another recipe"
        )
    if job.model.fuse == "on" and job.parallelism.tensor_parallel_degree > 1:
        yield (
            f"{named(job, 'model.fuse')}: tensor parallel weights are not fused; leave it at auto, which "
            "calls the modules one by one there, or set parallelism.tensor_parallel_degree = 1"
        )
    scales = job.float8.share_scales and "float8" in job.model.converters and fuses(job)
    if scales and job.float8.enable_fsdp_float8_all_gather:
        yield (
            f"{named(job, 'float8.share_scales')}: weights gathered in float8 have one scale each; leave out "
            "one of the two: this, or float8.enable_fsdp_float8_all_gather"
        )


def _chunked_loss(job: JobConfig) -> Iterator[str]:
    if job.training.loss_chunk_tokens is None:
        return
    for key, instead in (
        (
            "parallelism.tensor_parallel_degree",
            "each of its devices already holds only a part of the vocabulary",
        ),
        ("parallelism.pipeline_parallel_degree", "its last stage computes the loss from whole logits"),
    ):
        if get(job, key) > 1:
            yield (
                f"{named(job, 'training.loss_chunk_tokens')} cannot be combined with {named(job, key)}: "
                f"{instead}; leave one of the two out"
            )


def _optimizer(job: JobConfig, world_size: int) -> Iterator[str]:
    name, dtype = job.optimizer.name, job.training.dtype
    if name == "Adam" and dtype == "bfloat16":
        yield (
            f"{named(job, 'optimizer.name')} rounds weights to nearest, so that "
            f"{named(job, 'training.dtype')} would lose small updates; choose AdamW, which rounds "
            "them stochastically"
        )
    if name != "AdamW8bit":
        return
    copies = job.parallelism.data_parallel_replicate_degree * job.parallelism.pipeline_parallel_degree
    if world_size != copies:
        yield (
            f"{named(job, 'optimizer.name')} needs whole parameters, because its blocks of 256 numbers would "
            "straddle shards; train on one process or on copies "
            "(parallelism.data_parallel_replicate_degree), or choose AdamW with "
            "optimizer.state_dtype = bfloat16"
        )


def _health(job: JobConfig) -> Iterator[str]:
    """Measuring float8 health needs whole operands, and a layer's forward and backward in one process."""
    if "float8" not in job.model.converters or job.float8.health_every == 0:
        return
    for key, what in (
        ("tensor_parallel_degree", "each process has only a part of every operand"),
        ("pipeline_parallel_degree", "the schedule itself runs forward and backward"),
    ):
        degree = getattr(job.parallelism, key)
        if degree > 1:
            yield (
                f"{named(job, 'float8.health_every')}: with parallelism.{key} = {degree} {what}, so nothing "
                "can be measured; set it to 0, and measure in a run with data parallelism only"
            )


def _custom_import(job: JobConfig) -> Iterator[str]:
    module, key = job.experimental.custom_import, "experimental.custom_import"
    if not _MODULE.fullmatch(module):
        yield f"{named(job, key)} must be a dotted module name, like my_package.my_model"
    elif not _findable(module.split(".")):
        stem, _, ending = module.rpartition(".")
        if ending == "py":
            yield f"{named(job, key)} must be a module's name, not its file's: {stem}"
        else:
            yield f"{named(job, key)}: no such module in {Path.cwd()} or on Python's path (see PYTHONPATH)"


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


def _tokenizer(job: JobConfig) -> Iterator[str]:
    given, key = job.model.hf_assets_path, "model.hf_assets_path"
    path = Path(given).expanduser()
    found = path.is_file() or any((path / file).is_file() for file in _TOKENIZER_FILES)
    if given in names.TOKENIZERS or found:
        return
    if path.is_dir():
        wrong = f"the folder has none of {', '.join(_TOKENIZER_FILES)}"
    else:
        wrong = f"no such tokenizer{did_you_mean(given, names.TOKENIZERS)}"
    fetch = download_command(given)
    remedy = (
        f"instead: name a folder with tokenizer.json, or a shipped one: {', '.join(names.TOKENIZERS)}"
        if fetch is None
        else f"to fetch it: {fetch}"
    )
    yield f"{named(job, key)}: {wrong}\n  {remedy}"


def _outputs(job: JobConfig) -> Iterator[str]:
    folder = Path(job.job.dump_folder).expanduser()
    there = (path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    existing = next(there)
    if not existing.exists():  # mkdir fails there, whatever the link points to
        yield f"{named(job, 'job.dump_folder')}: {existing} is a dead link; name another folder"
        return
    if not existing.is_dir():
        what = "is a file" if existing == folder else f"lies below {existing}, which is a file"
        yield f"{named(job, 'job.dump_folder')} {what}; name another folder"
        return
    try:  # permissions do not suffice: a file system may be read-only, or accept no files at all, as /proc
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        yield (
            f"{named(job, 'job.dump_folder')}: cannot write in {existing} ({error.strerror}); name another "
            "folder"
        )
    for key, active, name in (
        ("checkpoint.folder", job.checkpoint.enable, job.checkpoint.folder),
        ("metrics.save_tb_folder", job.metrics.enable_tensorboard, job.metrics.save_tb_folder),
        ("profiling.save_traces_folder", job.profiling.enable_profiling, job.profiling.save_traces_folder),
    ):
        if active and (folder / name).is_file():
            yield f"{named(job, key)}: {folder / name} is a file; name a folder"


def _load_step(job: JobConfig) -> Iterator[str]:
    step = job.checkpoint.load_step
    if not job.checkpoint.enable or step == -1:
        return
    folder = Path(job.job.dump_folder).expanduser() / job.checkpoint.folder
    complete = [path.name for path in folder.glob("step-*") if (path / "state.json").is_file()]
    steps = sorted(int(match[1]) for name in complete if (match := _STEP.fullmatch(name)))
    if step not in steps:
        there = f"has the steps {', '.join(map(str, steps))}" if steps else "has no complete checkpoint"
        yield f"{named(job, 'checkpoint.load_step')}: {folder} {there}"


def _initial_load(job: JobConfig) -> Iterator[str]:
    """Whether initial_load_path is of the stated kind; its content is read when the model is built."""
    own = Path(job.job.dump_folder).expanduser() / job.checkpoint.folder
    if job.checkpoint.initial_load_path is None or (job.checkpoint.enable and any(own.glob("step-*"))):
        return  # a run that resumes does not read it again
    folder, key = Path(job.checkpoint.initial_load_path).expanduser(), "checkpoint.initial_load_path"
    in_hf = any(folder.glob("*.safetensors"))
    if not folder.is_dir():
        yield f"{named(job, key)}: no such folder"
    elif not in_hf and (folder / "params.json").is_file():
        yield (
            f"{named(job, key)} holds Meta's original files: octavo import {folder} --out FOLDER, and name "
            "that folder"
        )
    elif in_hf and not job.checkpoint.initial_load_in_hf:
        yield f"{named(job, key)} is a Hugging Face folder: add --checkpoint.initial_load_in_hf"
    elif job.checkpoint.initial_load_in_hf and not in_hf:
        yield (
            f"{named(job, key)}: checkpoint.initial_load_in_hf = true, but no *.safetensors is in this "
            "folder; leave the flag out for octavo's own checkpoints"
        )


def _gpu_only(job: JobConfig, gpus: int | None) -> Iterator[str]:
    if gpus != 0:
        return
    for key, wanted in (
        ("training.enable_cpu_offload", job.training.enable_cpu_offload),
        ("profiling.enable_memory_snapshot", job.profiling.enable_memory_snapshot),
        ("parallelism.enable_async_tensor_parallel", job.parallelism.enable_async_tensor_parallel),
        ("checkpoint.async_mode", job.checkpoint.async_mode == "async_with_pinned_mem"),
    ):
        if wanted:
            yield f"{named(job, key)} needs a GPU, and this machine has none"


def _rotation(job: JobConfig, gpus: int | None) -> Iterator[str]:
    """What ring attention cannot do; see distributed/ring_attention.py."""
    rotates = job.parallelism.context_parallel_rotate_method == "alltoall"
    if not rotates or job.parallelism.context_parallel_degree == 1:
        return
    setting = named(job, "parallelism.context_parallel_rotate_method")
    if job.training.document_mask:
        yield f"{setting} supports no masks, and training.document_mask = true: set it to allgather"
    if gpus and job.training.mixed_precision_param == "float32":
        yield (
            f"{setting} uses the flash kernel, which has no float32 on a GPU: set it to allgather, or set "
            "training.mixed_precision_param = bfloat16"
        )


def _offload(job: JobConfig, world_size: int) -> Iterator[str]:
    """CPU offload is a feature of FSDP, which one process that computes in float32 does not use."""
    alone = world_size == 1 and job.training.mixed_precision_param == "float32"
    if job.training.enable_cpu_offload and alone:
        yield (
            f"{named(job, 'training.enable_cpu_offload')} works with several processes, or with "
            "training.mixed_precision_param = bfloat16"
        )


def _seed(job: JobConfig, world_size: int) -> Iterator[str]:
    key = "checkpoint.create_seed_checkpoint"
    if job.checkpoint.create_seed_checkpoint and world_size > 1:
        yield f"{named(job, key)} is for one process, and there are {world_size}: set NGPU=1"
    if job.checkpoint.create_seed_checkpoint and job.checkpoint.initial_load_path is not None:
        yield f"{named(job, key)} writes the initial weights; leave checkpoint.initial_load_path out"


def _rewind(job: JobConfig) -> Iterator[str]:
    for key in ("fault_tolerance.non_finite", "fault_tolerance.spike"):
        if get(job, key) == "rewind" and not job.checkpoint.enable:
            yield f"{named(job, key)} loads a checkpoint, and none is saved: add --checkpoint.enable"


def _compiler(job: JobConfig, gpus: int | None) -> Iterator[str]:
    """torch.compile generates C++ on a CPU, and would report a missing compiler only in the first step."""
    compiler = missing_cxx() if job.compile.enable and gpus == 0 else None
    if compiler is not None:
        yield (
            f"{named(job, 'compile.enable')} needs a C++ compiler on a CPU, and {compiler or repr(compiler)} "
            "does not start: install it (Debian, Ubuntu: apt install g++; macOS: xcode-select --install), "
            "name another one in CXX, or leave compilation out (--compile.no-enable)"
        )


def _cpu_dtype() -> Iterator[str]:
    asked = os.environ.get("OCTAVO_CPU_DTYPE", "")
    if asked not in ("", "float32", "bfloat16"):
        yield f"OCTAVO_CPU_DTYPE={asked}: expected float32 or bfloat16"


def _packages(job: JobConfig) -> Iterator[str]:
    """Optional packages that the job needs and that are not installed."""
    extra = "'octavo[train]'"
    for key, active, package, source in (
        ("metrics.enable_tensorboard", job.metrics.enable_tensorboard, "tensorboard", extra),
        ("metrics.enable_wandb", job.metrics.enable_wandb, "wandb", "wandb"),
        ("metrics.enable_trackio", job.metrics.enable_trackio, "trackio", "trackio"),
        ("optimizer.name", job.optimizer.name == "AdamW8bit", "bitsandbytes", "'octavo[adam8bit]'"),
        ("training.dataset", job.training.dataset in names.STREAMED_DATASETS, "datasets", extra),
        ("validation.dataset", job.validation.dataset in names.STREAMED_DATASETS, "datasets", extra),
    ):
        if active and importlib.util.find_spec(package) is None:
            yield f"{named(job, key)} needs the package {package}: pip install {source}"
