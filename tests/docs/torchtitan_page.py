"""Writes docs/coming_from_torchtitan.md from the table that the configuration reads, and from RUNS.

python -m tests.docs.torchtitan_page
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from octavo.config import torchtitan

PAGE = Path(__file__).resolve().parents[2] / "docs/coming_from_torchtitan.md"


@dataclass(frozen=True)
class TitanRun:
    """One of torchtitan's integration runs: its name, processes and flags, or why there is none here."""

    name: str
    processes: int = 8
    flags: str = ""
    missing: str = ""


_P, _PP, _CP = "--parallelism.", "--parallelism.pipeline_parallel_", "--parallelism.context_parallel_"
_SHARD, _REPLICATE = f"{_P}data_parallel_shard_degree", f"{_P}data_parallel_replicate_degree"
_TP2, _DP1 = f"{_P}tensor_parallel_degree=2", f"{_SHARD}=1"
_AC = "--activation_checkpoint."
_VALIDATION = "--validation.enable --validation.fraction=0.1"
_FLOAT8 = "--model.converters=quantize.linear.float8 --quantize.linear.float8.enable_fsdp_float8_all_gather"

RUNS = (
    TitanRun("default", 4),
    TitanRun("1d_compile", 4, "--compile.enable"),
    TitanRun(
        "1d_compile_sac_op",
        4,
        f"--compile.enable {_AC}mode=selective {_AC}selective_ac_option=op",
    ),
    TitanRun("2d_eager", 4, _TP2),
    TitanRun("2d_compile", 4, f"--compile.enable {_TP2}"),
    TitanRun("full_checkpoint", 4, "--checkpoint.enable"),
    TitanRun("model_only_hf_checkpoint", 4, "--checkpoint.enable --checkpoint.last_save_in_hf"),
    TitanRun("last_save_model_only_fp32", 4, "--checkpoint.enable --checkpoint.last_save_model_only"),
    TitanRun("pp_1f1b", 2, f"{_PP}degree=2 {_PP}schedule=1F1B {_DP1}"),
    TitanRun("pp_gpipe", 2, f"{_PP}degree=2 {_PP}schedule=GPipe {_DP1}"),
    TitanRun("pp_dp_1f1b", 4, f"{_PP}degree=2 {_PP}schedule=1F1B {_SHARD}=2"),
    TitanRun("pp_dp_tp", 8, f"{_PP}degree=2 {_SHARD}=2 {_TP2}"),
    TitanRun("3d_compile", 8, f"--compile.enable {_PP}degree=2 {_SHARD}=2 {_TP2}"),
    TitanRun("pp_looped_1f1b", 4, f"{_PP}degree=4 {_PP}schedule=Interleaved1F1B"),
    TitanRun(
        "pp_looped_zero_bubble",
        4,
        f"{_PP}degree=4 {_PP}schedule=InterleavedZeroBubble {_AC}mode=full",
    ),
    TitanRun(
        "pp_zbv", 2, f"{_PP}degree=2 {_PP}schedule=ZBVZeroBubble --activation_checkpoint.mode=full {_DP1}"
    ),
    TitanRun(
        "pp_custom_csv",
        2,
        missing="the schedule's file is torchtitan's; `pipeline_parallel_schedule_csv` reads one of your own",
    ),
    TitanRun("optimizer_foreach", 4, "--optimizer.implementation=foreach"),
    TitanRun("ddp", 4, f"{_DP1} {_REPLICATE}=4"),
    TitanRun("hsdp", 4, f"{_SHARD}=2 {_REPLICATE}=2"),
    TitanRun("fsdp+cp", 4, f"{_CP}degree=4 {_CP}rotate_method=alltoall"),
    TitanRun("hsdp+tp", 8, f"{_SHARD}=2 {_REPLICATE}=2 {_TP2}"),
    TitanRun("fsdp+tp+cp", 8, f"{_SHARD}=2 {_TP2} {_CP}degree=2"),
    TitanRun("fsdp+tp+cp+pp", 8, f"{_PP}degree=2 {_TP2} {_CP}degree=2"),
    TitanRun("fsdp_reshard_always", 2, f"{_P}fsdp_reshard_after_forward=always"),
    TitanRun("gradient_accumulation", 2, "--training.local_batch_size=8 --training.global_batch_size=32"),
    TitanRun("float8", 4, f"{_FLOAT8} --quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"),
    TitanRun("validation_tp_cp_pp", 8, f"{_VALIDATION} {_TP2} {_CP}degree=2 {_PP}degree=2"),
    TitanRun("fsdp+flex_attn", 4, missing="one attention; `training.document_mask` for `block_causal`"),
    TitanRun("optional_checkpoint", 4, missing="checkpoints of the first step alone are not written"),
)

_HEAD = """\
# Coming from torchtitan

octavo reads torchtitan's TOML files of 2025: most keys have the same name and meaning. A key or a value that
is missing here is refused with the reason below, whatever it is set to, so that no setting is dropped without
a word.

## Keys

"""
_TAIL = """\
## Runs

torchtitan's integration runs as flags of `./run_train.sh`, each with `NGPU` processes and
`training.local_batch_size = 8`. A flag that would have no effect is an error, so some have a flag less than
there.

{runs}

## Checkpoints

A checkpoint of octavo is a folder `step-N` in PyTorch's distributed format (DCP), with a manifest of hashes
beside it. `checkpoint.initial_load_path` starts from such a folder, or with `checkpoint.initial_load_in_hf`
from a Hugging Face folder. Meta's original files come in by [`octavo import`](hugging_face.md).

A step's folder that torchtitan saved of Llama 3 gives its weights to `checkpoint.initial_load_path` too; its
optimizer, step and position in the data stay behind. Nothing in it is unpickled. It has no hashes to verify.
"""


def page() -> str:
    """The page, in Markdown."""
    parts = [_HEAD]
    table = torchtitan.table()
    sections = [section for section in table if section not in ("sections", "values")]
    for section in sections:
        keys = table[section]
        parts.append(f"### {section}\n\n")
        same = [key for key, why in keys.items() if why == "same"]
        if same:
            parts.append(f"The same: {', '.join(f'`{key}`' for key in same)}.\n\n")
        rows = [f"| `{key}` | {_said(why)} |\n" for key, why in keys.items() if why != "same"]
        if rows:
            parts += ["| missing | why |\n|---|---|\n", *rows, "\n"]
    parts += ["### Sections that are missing\n\n", "| section | why |\n|---|---|\n"]
    whole = {name: why for name, why in table["sections"].items() if name not in table}
    parts += [f"| `[{name}]` | {_said(why)} |\n" for name, why in whole.items()]
    parts += ["\n### Values that are missing\n\n", "| value | why |\n|---|---|\n"]
    parts += [f"| `{setting}` | {_said(why)} |\n" for setting, why in table["values"].items()]
    return "".join(parts) + "\n" + _TAIL.format(runs="\n".join(_run_rows()))


def _said(why: str) -> str:
    return why.replace("here it is ", "renamed: ")


def _run_rows() -> Iterator[str]:
    yield "| run | NGPU | here |\n|---|---|---|"
    for run in RUNS:
        here = f"`{run.flags}`" if run.flags else run.missing or "the defaults"
        yield f"| {run.name} | {run.processes} | {here} |"


if __name__ == "__main__":
    PAGE.write_text(page())
