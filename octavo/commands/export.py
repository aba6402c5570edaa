"""`octavo export`: a checkpoint becomes a folder that transformers, and what reads its format, loads.

    octavo export outputs --out exported
    octavo export outputs/checkpoint/step-100 --out exported --dtype bfloat16 --shard_size 2GB

After writing, the command reads back what it wrote and compares logits: its own model's before and after, and
transformers' where that is installed. Exit codes: 0; 2 for a mistake in what was asked; 1 where the logits
differ.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from octavo.commands.argparser import Parser
from octavo.hf import check_export, safetensors_folder
from octavo.hf.folder_writer import DEFAULT_SHARD, DTYPES, HfLayout, check_free, write_folder
from octavo.hf.model_sources import ModelSource, hf_weights, open_source


def _parser() -> Parser:
    parser = Parser(
        "octavo export",
        "Write a trained model as a Hugging Face folder: safetensors, config.json, tokenizer.\n"
        "The command reads it back and compares logits, with transformers' too where that is installed.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint (step-N), or a run's folder: its newest",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float32", help="of the weights (default: float32)"
    )
    parser.add_argument(
        "--shard_size",
        type=safetensors_folder.bytes_of,
        default=DEFAULT_SHARD,
        metavar="SIZE",
        help=f"the most that one file holds, and that the export holds in memory (default: {DEFAULT_SHARD})",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="the model's tokenizer, if it is not where the run had it"
    )
    parser.add_argument(
        "--custom_import", default="", metavar="MODULE", help="a module that registers the model; it is run"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`octavo export`: the exit code. Raises `ConfigError` for a mistake in what was asked."""
    options = _parser().read(sys.argv[1:] if argv is None else argv)
    check_free(options.out)
    source = open_source(options.checkpoint, tokenizer=options.tokenizer, custom_import=options.custom_import)
    dtype = DTYPES[options.dtype]
    layout = HfLayout(source.spec, source.args, source.weights, dtype, options.shard_size)
    print(f"Exporting {source.path} in {options.dtype}, {layout.total:,} bytes in {len(layout.plan)} file(s)")
    write_folder(options.out, layout, source.tokenizer, lambda file: print(f"  {file.name}", flush=True))
    print(f"Written: {options.out}")
    return 0 if _verify(source, options.out, dtype) else 1


def _verify(source: ModelSource, out: Path, dtype: torch.dtype) -> bool:
    """Whether what was written computes what the checkpoint computes; prints each comparison."""
    tokens_BS = check_export.sample_tokens(source)
    expected = check_export.own_logits(source, source.weights, tokens_BS, dtype)
    assert source.spec.hugging_face is not None
    again = hf_weights(out, source.spec, source.args, model="the exported model")
    results = {
        "read back by octavo": check_export.compare(
            check_export.own_logits(source, again, tokens_BS, dtype), expected
        )
    }
    theirs = check_export.transformers_logits(out, tokens_BS)
    if isinstance(theirs, str):
        print(f"Logits were not compared with transformers': {theirs}")
    else:
        results["loaded by transformers"] = check_export.compare(theirs, expected)
    for how, result in results.items():
        verdict = "within" if result.within else "BEYOND"
        print(
            f"Logits {how}: max abs difference {result.difference:.2e} over {tokens_BS.shape[1]} positions, "
            f"{verdict} the tolerance of {check_export.TOLERANCE:g}"
        )
    if dtype is not torch.float32:
        unrounded = check_export.own_logits(source, source.weights, tokens_BS, torch.float32)
        print(f"Rounding the weights alone moves logits by up to {(unrounded - expected).abs().max():.2e}")
    if not all(result.within for result in results.values()):
        print(
            f"octavo export: {out} does not compute what {source.path} computes; do not use it",
            file=sys.stderr,
        )
        return False
    return True
