"""Command lines of the commands that are no training job: argparse, with octavo's manner of failing."""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from octavo.config import ConfigError


class Parser(argparse.ArgumentParser):
    """Mistakes are one `ConfigError`; flags are whole words, in which `-` and `_` are the same."""

    def __init__(self, prog: str, description: str, epilog: str = ""):
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help)")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options in `argv`."""
        return self.parse_args(self._with_underscores(argv))

    def read_known(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options in `argv` that are this parser's, and all other words, in order."""
        return self.parse_known_args(self._with_underscores(argv))

    def _with_underscores(self, argv: Sequence[str]) -> list[str]:
        words = []
        for word in argv:
            name, equals, value = word.partition("=")
            if name.startswith("--") and len(name) > 2:
                word = "--" + name[2:].replace("-", "_") + equals + value
            words.append(word)
        return words


def whole(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """A converter for argparse: whole numbers from `low` to `high`."""
    limits = f"from {low} to {'2^63 - 1' if high == 2**63 - 1 else high}"

    def convert(text: str) -> int:
        value = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number {limits}, got {text!r}")
        return value

    return convert
