"""The console command `octavo`: a table of subcommands, each in a module that is imported only when called.

Exit codes: what the subcommand returns; 2 for an error in the command line or the configuration; or the
error's own code (3: no checkpoint verifies). Each error is one message.
"""

import errno
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from octavo import __version__
from octavo.config import ConfigError
from octavo.core.errors import did_you_mean
from octavo.core.streams import open_closed_streams
from octavo.core.terminal import show_uncaught_safely

_USAGE_ERROR = 2


def _preflight_train(argv: Sequence[str]) -> None:
    """Validate the job before importing the trainer and torch; print help and exit where it is asked for."""
    from octavo import config, preflight
    from octavo.launch import launcher

    job = config.load(argv)
    preflight.check(job, world_size=_world_size(), gpus=launcher.count_gpus(os.environ))


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", text):
        raise ConfigError(f"WORLD_SIZE={text}: expected a whole number from 1 up")
    return int(text)


@dataclass(frozen=True)
class Command:
    """One subcommand: `module` has `main(argv) -> int`; `preflight` is called with argv before it is
    imported.
    """

    module: str
    help: str
    preflight: Callable[[Sequence[str]], None] = lambda argv: None


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "train": Command(
            "octavo.train.trainer",
            "train a model in this process (./run_train.sh starts several)",
            _preflight_train,
        ),
        "compare": Command(
            "octavo.commands.compare.main", "train in several recipes, and report which keep the loss"
        ),
        "tune": Command(
            "octavo.commands.tune.main", "find the fastest float8 recipe of each layer on this GPU"
        ),
        "prepare": Command("octavo.commands.prepare", "tokenise text into shards that training reads"),
        "export": Command("octavo.commands.export", "write a trained model as a Hugging Face folder"),
        "import": Command(
            "octavo.commands.import_", "make a checkpoint from a Hugging Face or an original Llama model"
        ),
        "estimate": Command(
            "octavo.commands.estimate.main", "predict memory, messages and time of a job, without running it"
        ),
        "generate": Command("octavo.commands.generate", "continue a text with a trained model"),
        "doctor": Command(
            "octavo.commands.doctor.main", "check whether this machine, and a job, are ready to train"
        ),
        "download": Command("octavo.commands.download", "fetch a tokenizer from Hugging Face"),
    }
)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: octavo [-h] [--version] COMMAND ...",
            "",
            "Float8 pretraining on PyTorch.",
            "",
            "commands:",
            *rows,
            "",
            "octavo COMMAND --help lists the options of a command.",
        ]
    )


def _prepare(command: Command, argv: Sequence[str]) -> Callable[[Sequence[str]], int]:
    """The command's `main`, once its arguments are found to be in order."""
    try:
        command.preflight(argv)
        run: Callable[[Sequence[str]], int] = importlib.import_module(command.module).main
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "octavo":
            raise
        raise ConfigError(f"the package {error.name} is not installed: pip install 'octavo[train]'") from None
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo argv` (default: the process's own arguments) and return its exit code."""
    open_closed_streams()
    show_uncaught_safely()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else _USAGE_ERROR
    name, rest = argv[0], argv[1:]
    if name == "--version" and rest:
        print(f"octavo: --version stands alone, but {rest[0]!r} follows it", file=sys.stderr)
        return _USAGE_ERROR
    if name == "--version":
        print(f"octavo {__version__}")
        return 0
    if name not in COMMANDS:
        print(
            f"octavo: no command {name!r}{did_you_mean(name, COMMANDS)} (octavo --help lists them)",
            file=sys.stderr,
        )
        return _USAGE_ERROR
    try:
        return _prepare(COMMANDS[name], rest)(rest)
    except ConfigError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", _USAGE_ERROR))
    except BrokenPipeError:  # octavo train --help | head
        _print_no_more()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _print_no_more()
        print(f"octavo: its output cannot be written: {error.strerror}", file=sys.stderr)
        return 1


def _print_no_more() -> None:
    """Redirect stdout to /dev/null, or Python would fail again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
