"""`octavo generate`: continues a text with a trained model.

    octavo generate --checkpoint outputs --prompt "ROMEO. What light"
    octavo generate --checkpoint exported --prompt "To be" --temperature 0 --max_new_tokens 64

The text is streamed to standard output; statistics go to standard error, so a pipe receives the text only.
The model computes in high precision also if it was trained in float8: a checkpoint holds unquantized weights.
"""

import argparse
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from octavo.commands.argparser import Parser, bounded_float, bounded_int, given_flags
from octavo.commands.sampling import Recompute, Sampling, TextStream, generate
from octavo.config import ConfigError
from octavo.hf.folder_writer import DTYPES
from octavo.hf.model_sources import ModelSource, open_model
from octavo.hf.stored_weights import load_weights
from octavo.metrics.device import pick_device

_SHOWN = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control character -> the replacement shown on a terminal, which would execute it."""


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
        "--max_new_tokens",
        type=bounded_int(1),
        default=200,
        metavar="N",
        help="stop after N tokens (default: 200)",
    )
    parser.add_argument(
        "--temperature",
        type=bounded_float(0, 100),
        default=0.7,
        metavar="T",
        help="divides the logits: 0 always takes the most likely token, 1 samples from the model's own "
        "distribution (default: 0.7)",
    )
    parser.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    parser.add_argument(
        "--top_k",
        type=bounded_int(0),
        default=0,
        metavar="K",
        help="sample from the K most likely tokens (default: all)",
    )
    parser.add_argument(
        "--top_p",
        type=bounded_float(0, 1, above=True),
        default=1.0,
        metavar="P",
        help="sample from the smallest set of tokens whose total probability is P (default: 1, all)",
    )
    parser.add_argument(
        "--seed",
        type=bounded_int(0),
        metavar="N",
        help="the same seed gives the same text (default: a random one, which is printed)",
    )
    parser.add_argument("--ignore_eos", action="store_true", help="continue past the end of the document")
    parser.add_model_source_options(list(DTYPES), "of the computation (default: float32)")
    return parser


def _options(argv: Sequence[str]) -> argparse.Namespace:
    options = _parser().read(argv)
    given = given_flags(argv)
    if options.greedy:
        if "temperature" in given and options.temperature != 0:
            raise ConfigError(f"--greedy and --temperature {options.temperature:g} contradict each other")
        options.temperature = 0.0
    unused = [flag for flag in ("top_k", "top_p", "seed") if flag in given]
    if options.temperature == 0 and unused:
        raise ConfigError(
            f"--{unused[0]} would have no effect: with temperature 0 the most likely token is always taken"
        )
    if not options.prompt:
        raise ConfigError("--prompt is empty; give the model a word to start from")
    return options


def encode_prompt(source: ModelSource, prompt: str) -> list[int]:
    """Return the prompt's token ids, with a BOS first if the tokenizer has one, as in training.

    Raises:
        ConfigError: the prompt fills the model's context, or is not Unicode text.
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
            f"{source.context:,}: no token can follow; shorten it"
        )
    return ids


def run(source: ModelSource, options: argparse.Namespace, out: TextIO, log: TextIO) -> None:
    """Write the prompt and its continuation to `out`, and the statistics to `log`."""
    prompt = encode_prompt(source, options.prompt)
    limit = min(options.max_new_tokens, source.context - len(prompt))
    device = pick_device()
    model = load_weights(source.build(len(prompt) + limit), source.weights, DTYPES[options.dtype], device)
    make_decoder = source.spec.decoder
    decode = Recompute(model) if make_decoder is None else make_decoder(model, len(prompt) + limit)
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    sampling = Sampling(options.temperature, options.top_k, options.top_p)

    stream = TextStream(source.tokenizer)
    write = _writer(out)
    write(options.prompt)
    start, count, reached_eos = time.perf_counter(), 0, False
    try:
        for token in generate(decode, prompt, sampling, max_tokens=limit, seed=seed, device=device):
            if token == source.tokenizer.eos_id and not options.ignore_eos:
                reached_eos = True
                break
            count += 1
            write(stream.add(token))
    except ValueError as error:
        raise ConfigError(f"{source.path}: {error}") from None
    finally:
        write(stream.end() + "\n")
    seconds = time.perf_counter() - start
    reason = "the model ended the document" if reached_eos else "--max_new_tokens"
    if not reached_eos and count < options.max_new_tokens:
        reason = f"the model was trained on sequences of {source.context:,} tokens"
    seed_text = "" if sampling.temperature == 0 else f"; seed {seed}"
    print(f"[{count} tokens, {count / seconds:.0f}/s; stopped by: {reason}{seed_text}]", file=log)


def _writer(out: TextIO) -> Callable[[str], None]:
    """Return a function that writes text and flushes; on a terminal it replaces control characters."""
    is_terminal = out.isatty()

    def write(text: str) -> None:
        if text:
            out.write(text.translate(_SHOWN) if is_terminal else text)
            out.flush()

    return write


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo generate`; returns the exit code. Raises `ConfigError` for a usage error."""
    options = _options(sys.argv[1:] if argv is None else argv)
    source = open_model(options.checkpoint, tokenizer=options.tokenizer, custom_import=options.custom_import)
    if isinstance(out := sys.stdout, TextIO) or hasattr(out, "reconfigure"):
        out.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    try:
        run(source, options, sys.stdout, sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 0
