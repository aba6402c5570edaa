"""`octavo generate`: a trained model continues a text.

    octavo generate --checkpoint outputs --prompt "ROMEO. What light"
    octavo generate --checkpoint exported --prompt "To be" --temperature 0 --max_new_tokens 64

The text goes to standard output as it comes, what there is to say about it to standard error, so a pipe
gets the text alone. The model computes in high precision whatever it was trained in: the weights in a
checkpoint are plain.
"""

import argparse
import math
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from octavo.commands.argparser import Parser, whole
from octavo.commands.sampling import Recompute, Sampling, TextStream, generate
from octavo.config import ConfigError
from octavo.hf.folder_writer import DTYPES
from octavo.hf.model_sources import ModelSource, open_source
from octavo.hf.stored_weights import load
from octavo.metrics.device import pick_device

_SHOWN = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters, which a terminal would obey, and what is shown in their place."""


def _number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """A converter for argparse: numbers from `low` (or `above` it) to `high`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or value > high or math.isinf(value):
            start = f"above {low:g}" if above else f"from {low:g} up"
            end = "" if math.isinf(high) else f", at most {high:g}"
            raise argparse.ArgumentTypeError(f"expected a number {start}{end}, got {text!r}")
        return value

    return convert


def _parser() -> Parser:
    parser = Parser("octavo generate", "Continue a text with a trained model.")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a checkpoint (step-N), a run's folder (its newest), or a Hugging Face folder",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "--max_new_tokens", type=whole(1), default=200, metavar="N", help="stop after so many (default: 200)"
    )
    parser.add_argument(
        "--temperature",
        type=_number(0, 100),
        default=0.7,
        metavar="T",
        help="how bold: 0 takes the likeliest token each time, 1 the model's own distribution (default: 0.7)",
    )
    parser.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    parser.add_argument(
        "--top_k",
        type=whole(0),
        default=0,
        metavar="K",
        help="choose among the K likeliest tokens (default: all)",
    )
    parser.add_argument(
        "--top_p",
        type=_number(0, 1, above=True),
        default=1.0,
        metavar="P",
        help="choose among the fewest tokens that have this probability together (default: 1, all)",
    )
    parser.add_argument(
        "--seed",
        type=whole(0),
        metavar="N",
        help="the same seed gives the same text (default: a new one, told)",
    )
    parser.add_argument("--ignore_eos", action="store_true", help="go on where the model ends the document")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float32", help="to compute in (default: float32)"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="the model's tokenizer, if it is not where the run had it"
    )
    parser.add_argument(
        "--custom_import", default="", metavar="MODULE", help="a module that registers the model; it is run"
    )
    return parser


def _options(argv: Sequence[str]) -> argparse.Namespace:
    options = _parser().read(argv)
    given = {word.partition("=")[0].replace("-", "_") for word in argv}
    if options.greedy:
        if "__temperature" in given and options.temperature != 0:
            raise ConfigError(f"--greedy and --temperature {options.temperature:g} contradict each other")
        options.temperature = 0.0
    idle = [flag for flag in ("top_k", "top_p", "seed") if f"__{flag}" in given]
    if options.temperature == 0 and idle:
        raise ConfigError(
            f"--{idle[0]} would have no effect: with temperature 0 the likeliest token is always taken"
        )
    if not options.prompt:
        raise ConfigError("--prompt is empty; give the model a word to go on from")
    return options


def encode_prompt(source: ModelSource, prompt: str) -> list[int]:
    """The ids that the model is given: as in training, a document begins with the id that opens one.

    Raises:
        ConfigError: the prompt fills the model's context, or is no Unicode text.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("--prompt is not UTF-8 text") from None
    ids = source.tokenizer.encode(prompt, bos=source.tokenizer.bos_id is not None)
    if not ids:
        raise ConfigError(f"--prompt {prompt!r} has no tokens in {source.tokenizer.source}; give another one")
    if len(ids) >= source.context:
        raise ConfigError(
            f"--prompt has {len(ids):,} tokens, and the model was trained on sequences of "
            f"{source.context:,}: nothing can follow; shorten it"
        )
    return ids


def run(source: ModelSource, options: argparse.Namespace, out: TextIO, log: TextIO) -> None:
    """Continue the prompt on `out`."""
    prompt = encode_prompt(source, options.prompt)
    most = min(options.max_new_tokens, source.context - len(prompt))
    device = pick_device()
    model = load(source.build(len(prompt) + most), source.weights, DTYPES[options.dtype], device)
    make = source.spec.decoder
    decode = Recompute(model) if make is None else make(model, len(prompt) + most)
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    how = Sampling(options.temperature, options.top_k, options.top_p)

    stream = TextStream(source.tokenizer)
    show = _printer(out)
    show(options.prompt)
    began, count, ended = time.perf_counter(), 0, False
    try:
        for id_ in generate(decode, prompt, how, most=most, seed=seed, device=device):
            if id_ == source.tokenizer.eos_id and not options.ignore_eos:
                ended = True
                break
            count += 1
            show(stream.add(id_))
    except ValueError as error:
        raise ConfigError(f"{source.path}: {error}") from None
    finally:
        show(stream.end() + "\n")
    seconds = time.perf_counter() - began
    stopped = "the model ended the document" if ended else "--max_new_tokens"
    if not ended and count < options.max_new_tokens:
        stopped = f"the model was trained on sequences of {source.context:,} tokens"
    seeded = "" if how.temperature == 0 else f"; seed {seed}"
    print(f"[{count} tokens, {count / seconds:.0f}/s; stopped by: {stopped}{seeded}]", file=log)


def _printer(out: TextIO) -> Callable[[str], None]:
    """Writes text at once; to a terminal without what it would take for commands."""
    live = out.isatty()

    def show(text: str) -> None:
        if text:
            out.write(text.translate(_SHOWN) if live else text)
            out.flush()

    return show


def main(argv: Sequence[str] | None = None) -> int:
    """`octavo generate`: the exit code. Raises `ConfigError` for a mistake in what was asked."""
    options = _options(sys.argv[1:] if argv is None else argv)
    source = open_source(options.checkpoint, tokenizer=options.tokenizer, custom_import=options.custom_import)
    if isinstance(out := sys.stdout, TextIO) or hasattr(out, "reconfigure"):
        out.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    try:
        run(source, options, sys.stdout, sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 0
