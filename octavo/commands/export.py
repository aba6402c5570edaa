"""`octavo export`: writes a checkpoint as a Hugging Face folder, for transformers and compatible tools.

    octavo export outputs --out exported
    octavo export outputs/checkpoint/step-100 --out exported --dtype bfloat16 --shard_size 2GB

After writing, the command reads the folder back and compares its logits with the checkpoint's; transformers'
logits too, if it is installed. Exit codes: 0; 1 if the logits differ; 2 for a usage error.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from octavo.commands.argparser import Parser
from octavo.hf import check_export, safetensors_folder
from octavo.hf.folder_writer import DEFAULT_SHARD_SIZE, DTYPES, ExportPlan, require_empty, save_pretrained
from octavo.hf.model_sources import ModelSource, open_hf_weights, open_model


def _parser() -> Parser:
    parser = Parser(
        "octavo export",
        "Write a trained model as a Hugging Face folder: safetensors, config.json, tokenizer.\n"
        "The command reads it back and compares logits, with transformers' too if it is installed.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint (step-N), or a run's folder, of which the newest checkpoint is taken",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--shard_size",
        type=safetensors_folder.parse_size,
        default=DEFAULT_SHARD_SIZE,
        metavar="SIZE",
        help=f"largest size of one file, and of the export's memory (default: {DEFAULT_SHARD_SIZE})",
    )
    parser.add_model_source_options(list(DTYPES), "of the weights (default: float32)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo export`; returns the exit code. Raises `ConfigError` for a usage error."""
    options = _parser().read(sys.argv[1:] if argv is None else argv)
    require_empty(options.out)
    source = open_model(options.checkpoint, tokenizer=options.tokenizer, custom_import=options.custom_import)
    dtype = DTYPES[options.dtype]
    plan = ExportPlan(source.spec, source.args, source.weights, dtype, options.shard_size)
    files = len(plan.shards)
    print(f"Exporting {source.path} in {options.dtype}, {plan.total_bytes:,} bytes in {files} file(s)")
    save_pretrained(options.out, plan, source.tokenizer, lambda file: print("  " + file.name, flush=True))
    print(f"Written: {options.out}")
    return 0 if _verify(source, options.out, dtype) else 1


def _verify(source: ModelSource, out: Path, dtype: torch.dtype) -> bool:
    """Print each comparison of logits; returns whether all are within the tolerance."""
    tokens_BS = check_export.sample_tokens(source)
    expected = check_export.octavo_logits(source, source.weights, tokens_BS, dtype)
    assert source.spec.hugging_face is not None
    again = open_hf_weights(out, source.spec, source.args, model="the exported model")
    results = {
        "read back by octavo": check_export.compare_logits(
            check_export.octavo_logits(source, again, tokens_BS, dtype), expected
        )
    }
    theirs = check_export.transformers_logits(out, tokens_BS)
    if isinstance(theirs, str):
        print(f"Logits were not compared with transformers: {theirs}")
    else:
        results["loaded by transformers"] = check_export.compare_logits(theirs, expected)
    for how, result in results.items():
        verdict = "within" if result.within else "BEYOND"
        print(
            f"Logits {how}: max abs difference {result.difference:.2e} over {tokens_BS.shape[1]} positions, "
            f"{verdict} the tolerance of {check_export.TOLERANCE:g}"
        )
    if dtype is not torch.float32:
        unrounded = check_export.octavo_logits(source, source.weights, tokens_BS, torch.float32)
        print(f"Rounding the weights alone changes logits by up to {(unrounded - expected).abs().max():.2e}")
    within = all(result.within for result in results.values())
    if not within:
        print(f"octavo export: {out} does not reproduce {source.path}; do not use it", file=sys.stderr)
    return within
