"""From `./run_train.sh` to running processes: checks everything that can be checked, then starts them.

A training process would find a wrong option only after seconds of importing torch, and each process would
report it. So variables, configuration and paths are checked here first, without torch, in a fraction of a
second: one message, exit code 2. `elastic.py` then runs the processes.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from octavo import config, preflight
from octavo.config import ConfigError, config_file, flags
from octavo.config.values import shown
from octavo.core.format import count
from octavo.launch.elastic import Launch, run
from octavo.launch.heartbeat import Rendezvous
from octavo.launch.supervisor import PIPELINE_VARIABLE

DEFAULT_CONFIG = "demo.toml"
_LAST_PORT = 2**16 - 1
_MEETS_WITHIN = 600

VARIABLES = """\
variables:
  CONFIG_FILE    the TOML file of the job: a path, or the name of one that octavo ships (default: demo.toml,
                 the Llama 3 debug model in float8). --job.config_file says the same
  NGPU           processes on this machine (default: the GPUs present, else 1)
  LOG_RANK       local ranks whose output is shown, comma-separated (default: 0)
  OCTAVO_PYTHON  the Python to use, with torch >= 2.11 (default: the active environment's, if its torch fits;
                 else .venv beside run_train.sh, made on the first start)
  OCTAVO_TORCH_INDEX
                 package index that torch is installed from on the first start (default: pip's own)
  OCTAVO_CPU_DTYPE
                 what training.mixed_precision_param = auto means on a CPU: float32 or bfloat16 (default:
                 bfloat16 where there are matrix units for it)
  CHECK_ONLY=1   check the variables and options (exit code 2 if one is wrong), and start nothing
  several machines, the same command on each:
  NNODES         how many machines (default: 1)
  RDZV_ENDPOINT  host:port on one of them, where all meet
  RDZV_ID        a name that distinguishes jobs (default: octavo)
  NODE_RANK      this machine's number from 0, if ranks must follow the machines' order; the host of
                 RDZV_ENDPOINT is number 0
  RDZV_TIMEOUT   seconds to wait for the other machines at the start (default: 600)

SIGTERM, SIGUSR1 or Ctrl-C: all processes finish the step, save (with --checkpoint.enable) and exit with code
75; the same command resumes. Ctrl-C again ends at once.
exit codes:
  0 done, 2 wrong option, 3 no checkpoint verifies, 4 a loss or gradient was not finite,
  75 stopped and saved: run it again, 128 + n ended by signal n with nothing saved, 1 anything else
"""


def plan(
    argv: Sequence[str], environ: Mapping[str, str], *, gpus: int, cores: int, terminal: bool = False
) -> Launch:
    """Decide what to start, given the options `argv`, the variables `environ`, and the numbers of GPUs and
    cores.

    `terminal`: whether standard error is a terminal, so that log lines may have colours.

    Raises:
        ConfigError: a variable, an option or a combination of them cannot work.
    """
    processes = processes_wanted(environ, gpus)
    shown_ranks = _shown_ranks(environ, processes)
    rendezvous, torchrun_options = _read_rendezvous(environ)
    nodes = 1 if rendezvous is None else rendezvous.machines
    options = with_config_file(argv, environ)
    job = config.load(options)
    preflight.check(job, world_size=nodes * processes, gpus=gpus)
    environment = _environment(environ, processes=processes, gpus=gpus, cores=cores, terminal=terminal)
    if job.parallelism.pipeline_parallel_degree > 1:
        environment[PIPELINE_VARIABLE] = "1"
    return Launch(
        command=("-m", "octavo.train", *options),
        local=processes,
        torchrun_options=torchrun_options,
        processes=nodes * processes,
        options=tuple(options),
        environment=environment,
        shown_ranks=shown_ranks,
        dump_folder=job.job.dump_folder,
        rendezvous=rendezvous,
    )


def processes_wanted(environ: Mapping[str, str], gpus: int) -> int:
    """The number of processes that NGPU asks for on a machine with `gpus` GPUs. Raises `ConfigError`."""
    processes = _number(environ, "NGPU", default=max(gpus, 1))
    if gpus and processes > gpus:
        raise ConfigError(
            f"NGPU={processes}: this machine has {count(gpus, 'visible GPU')}; "
            f"set NGPU to {gpus} or less, or unset it"
        )
    return processes


def with_config_file(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """`argv`, with the TOML file of CONFIG_FILE or the default if it names none. Raises `ConfigError`."""
    return [*_config_file(argv, environ), *argv]


def _number(environ: Mapping[str, str], name: str, *, default: int) -> int:
    """A positive integer from the environment; an empty variable counts as unset."""
    text = environ.get(name, "").strip() or str(default)
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", text):
        raise ConfigError(f"{name}={text}: expected a whole number from 1 up (to 999999)")
    return int(text)


def _check_only(environ: Mapping[str, str]) -> bool:
    text = environ.get("CHECK_ONLY", "").strip()
    if text not in ("", "0", "1"):
        raise ConfigError(f"CHECK_ONLY={text}: expected 1, to start nothing, or 0")
    return text == "1"


def _shown_ranks(environ: Mapping[str, str], processes: int) -> frozenset[int]:
    text = environ.get("LOG_RANK", "").strip() or "0"
    ranks = text.split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,6}\s*", rank) and int(rank) < processes for rank in ranks):
        allowed = "0" if processes == 1 else f"0 to {processes - 1}"
        raise ConfigError(
            f"LOG_RANK={text}: expected local ranks, comma-separated; with {count(processes, 'process')} "
            f"on this machine: {allowed}"
        )
    return frozenset(map(int, ranks))


def _read_rendezvous(environ: Mapping[str, str]) -> tuple[Rendezvous | None, tuple[str, ...]]:
    """Where the launchers of several machines meet, and torchrun's options for it; (None, ()) for one
    machine.
    """
    nodes = _number(environ, "NNODES", default=1)
    if nodes == 1:
        for name in ("RDZV_ENDPOINT", "RDZV_ID", "RDZV_TIMEOUT", "NODE_RANK"):
            given = environ.get(name, "").strip()
            if given and not (name == "NODE_RANK" and re.fullmatch("0+", given)):
                raise ConfigError(
                    f"{name}={environ[name]} is for several machines, and NNODES is "
                    f"{'1' if environ.get('NNODES', '').strip() else 'not set'}: "
                    f"set NNODES to how many there are, or unset {name}"
                )
        return None, ()

    endpoint = environ.get("RDZV_ENDPOINT", "").strip()
    match = re.fullmatch(r"(\S+):([0-9]+)", endpoint)
    if not match:
        raise ConfigError(
            f"RDZV_ENDPOINT={endpoint}: NNODES={nodes} needs host:port of one of the machines, "
            "the same on all, such as node0:29500"
        )
    if not re.fullmatch(r"0*[1-9][0-9]{0,4}", match[2]) or int(match[2]) > _LAST_PORT:
        raise ConfigError(f"RDZV_ENDPOINT={endpoint}: the port must be between 1 and {_LAST_PORT}")
    timeout = _number(environ, "RDZV_TIMEOUT", default=_MEETS_WITHIN)
    job = environ.get("RDZV_ID") or "octavo"
    found = (
        f"--nnodes={nodes}",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={job}",
        f"--rdzv-conf=timeout={timeout},join_timeout={timeout}",
    )
    rendezvous = Rendezvous(match[1].strip("[]"), int(match[2]), job, nodes, timeout)
    rank = environ.get("NODE_RANK", "").strip()
    if not rank:
        return rendezvous, (*found, "--rdzv-backend=c10d")
    if not re.fullmatch(r"[0-9]{1,6}", rank) or int(rank) >= nodes:
        raise ConfigError(f"NODE_RANK={rank}: expected 0 to {nodes - 1}, for NNODES={nodes}")
    rendezvous = replace(rendezvous, number=int(rank))
    return rendezvous, (*found, "--rdzv-backend=static", f"--node-rank={rank}")


def unused_machines(environ: Mapping[str, str]) -> str | None:
    """A warning where the platform has given this job several machines, and NNODES is not set."""
    if environ.get("NNODES", "").strip():
        return None
    for name in ("PET_NNODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"):
        numbers = re.findall(r"[0-9]{1,6}", environ.get(name, ""))  # PET_NNODES may be "least:most"
        if numbers and int(numbers[-1]) > 1:
            return (
                f"{name}={environ[name]}, but NNODES is not set: this machine trains by itself. To train on "
                f"all of them, set NNODES={numbers[-1]} and RDZV_ENDPOINT=host:port on each; if one is "
                "meant, set NNODES=1"
            )
    return None


def _config_file(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The option that names the TOML file; empty if `argv` names one."""
    variable = environ.get("CONFIG_FILE", "")
    option = flags.config_file(flags.read(argv)[0])
    if option is not None and not variable:
        return []
    try:
        path = config_file.find(variable) if variable else config_file.TRAIN_CONFIGS / DEFAULT_CONFIG
    except ConfigError as error:
        raise ConfigError(f"CONFIG_FILE={shown(variable)}: {error}") from None
    if option is None:
        return [f"--job.config_file={path}"]
    try:
        same = config_file.find(option.text).samefile(path)
    except ConfigError:
        same = False
    if not same:
        raise ConfigError(
            f"CONFIG_FILE={variable} and {option.where} {option.text} name two files; give one of them"
        )
    return []


_KEEP_MEMORY = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=67108864:"
    "glibc.malloc.trim_threshold=1073741824:glibc.malloc.top_pad=67108864"
)
"""A step frees its activations and allocates them again. By default glibc returns much of that memory to the
system in between, page by page; with these settings it keeps up to 1 GiB and asks for huge pages. Steps on a
CPU took 8% less time.
"""


def _environment(
    environ: Mapping[str, str], *, processes: int, gpus: int, cores: int, terminal: bool
) -> dict[str, str]:
    """Variables for the training processes; those that the user has set are kept."""
    # Never the working directory: files of a downloaded folder would run in place of Python's own modules.
    paths = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    wanted = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if "PYTHONUNBUFFERED" not in environ:
        wanted["PYTHONUNBUFFERED"] = "1"  # their output is read from files while they run
    if terminal and "FORCE_COLOR" not in environ and not environ.get("NO_COLOR"):
        wanted["FORCE_COLOR"] = "1"  # the processes write to files, not to a terminal
    if processes > 1:
        wanted["OMP_NUM_THREADS"] = environ.get("OMP_NUM_THREADS") or str(max(1, cores // processes))
    if gpus:
        if "PYTORCH_CUDA_ALLOC_CONF" not in environ:
            wanted["PYTORCH_ALLOC_CONF"] = environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    else:
        # OpenMP threads that spin while they wait slow down everything else on the same cores.
        wanted["GOMP_SPINCOUNT"] = environ.get("GOMP_SPINCOUNT", "0")
        wanted["OMP_WAIT_POLICY"] = environ.get("OMP_WAIT_POLICY", "passive")
        wanted["GLIBC_TUNABLES"] = environ.get("GLIBC_TUNABLES", _KEEP_MEMORY)
    return wanted


def visible_gpus(listing: str, visible_devices: str | None) -> int:
    """How many GPUs CUDA would show, from the text of `nvidia-smi -L` and the value of CUDA_VISIBLE_DEVICES.

    As CUDA does, entries count up to the first that names no device; a UUID may be cut short.
    """
    uuids = re.findall(r"^GPU \d+:.*\(UUID: ([^)]+)\)", listing, flags=re.MULTILINE)
    if visible_devices is None:
        return len(uuids)
    slices = re.findall(r"^\s+MIG .*\(UUID: ([^)]+)\)", listing, flags=re.MULTILINE)
    count = 0
    for entry in (entry.strip() for entry in visible_devices.split(",")):
        if entry.isdecimal():
            known = int(entry) < len(uuids)
        else:
            known = bool(entry) and any(uuid.startswith(entry) for uuid in (*uuids, *slices))
        if not known:
            break
        count += 1
    return count


def count_gpus(environ: Mapping[str, str]) -> int:
    """The number of NVIDIA GPUs that training will see on this machine, without importing torch."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    gpus = visible_gpus(listing, environ.get("CUDA_VISIBLE_DEVICES"))
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:  # built from source: its version is unknown
        return gpus
    if gpus and torch.endswith("+cpu"):
        print(
            f"[octavo] {count(gpus, 'GPU')} present, but torch {torch} is a CPU build: training on the CPU",
            file=sys.stderr,
        )
        return 0
    return gpus


def usable_cores() -> int:
    """The number of CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line and the environment say; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if flags.wants_help(argv):
        from octavo.config.option_help import help_text

        print(f"{help_text('./run_train.sh')}\n{VARIABLES}", end="")
        return 0
    try:
        check_only = _check_only(os.environ)
        launch = plan(
            argv,
            os.environ,
            gpus=count_gpus(os.environ),
            cores=usable_cores(),
            terminal=sys.stderr.isatty(),
        )
    except ConfigError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 2
    if warning := unused_machines(os.environ):
        print(f"octavo: {warning}", file=sys.stderr)
    if check_only:
        return 0
    return run(launch)
