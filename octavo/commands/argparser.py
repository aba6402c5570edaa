"""The argument parser that all commands but `octavo train` share, and converters for its values."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from octavo.config import ConfigError

LARGEST_INT = 2**63 - 1


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` for a usage error. Flags cannot be abbreviated; `-` and `_` are equal in them."""

    def __init__(self, prog: str, description: str, epilog: str = ""):
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): ignored explicit argument '.*'$", r"\1 takes no value", message)
        raise ConfigError(f"{message} ({self.prog} --help)")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`."""
        return self.parse_args(_with_underscores(argv))

    def read_known(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse this parser's options in `argv`; also returns all other words, in order."""
        return self.parse_known_args(_with_underscores(argv))

    def add_model_source_options(self, dtypes: Sequence[str], dtype_help: str) -> None:
        """Add `--dtype`, `--tokenizer` and `--custom_import`, for commands that read a trained model."""
        self.add_argument("--dtype", choices=sorted(dtypes), default="float32", help=dtype_help)
        self.add_argument(
            "--tokenizer", metavar="PATH", help="the model's tokenizer, if it has moved since the run"
        )
        self.add_argument(
            "--custom_import",
            default="",
            metavar="MODULE",
            help="import this module, which registers the model",
        )


def given_flags(argv: Sequence[str]) -> set[str]:
    """The names of the flags in `argv`, without `--` and with underscores."""
    return {word.partition("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}


def _with_underscores(argv: Sequence[str]) -> list[str]:
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--") and len(name) > 2:
            word = "--" + name[2:].replace("-", "_") + equals + value
        words.append(word)
    return words


def bounded_int(low: int, high: int = LARGEST_INT) -> Callable[[str], int]:
    """An argparse type: whole numbers from `low` to `high`."""
    limits = f"from {low} to {'2^63 - 1' if high == LARGEST_INT else high}"

    def convert(text: str) -> int:
        value = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number {limits}, got {text!r}")
        return value

    return convert


def bounded_float(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: numbers from `low` (with `above`, greater than it) to `high`."""
    limits = f"above {low:g}, at most {high:g}" if above else f"from {low:g} to {high:g}"

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return convert
