"""Compares the logits of an exported model with those of its checkpoint.

octavo's logits are computed with one linear weight in memory at a time: it is read when its layer is called
and dropped afterwards, so models larger than the memory can be checked. transformers needs the whole model in
memory; if that does not fit, its comparison is skipped and the report says so.

Both sides compute in float32 from the weights in the exported dtype, so the comparison checks the export and
not the rounding to bfloat16.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.hf.model_sources import ModelSource
from octavo.hf.stored_weights import Weights, materialize_buffers, read_parameters

TOLERANCE = 1e-4
"""Of the largest difference between logits: absolute for logits up to 1, relative to the largest beyond."""

POSITIONS = 64


@dataclass(frozen=True)
class LogitsComparison:
    """The largest absolute difference of logits, and whether it is within the tolerance."""

    difference: float
    within: bool


def sample_tokens(source: ModelSource) -> Tensor:
    """A fixed sequence of random tokens, int64 [1, S]."""
    generator = torch.Generator().manual_seed(0)
    length = min(POSITIONS, source.context)
    return torch.randint(source.tokenizer.vocab_size, (1, length), generator=generator)


@torch.no_grad()
def octavo_logits(source: ModelSource, weights: Weights, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [B, S, V] of octavo's model with `weights` rounded to `dtype`, in float32 on the CPU."""

    def read(name: str) -> Tensor:
        return weights.read(name).to(dtype)

    rounded = Weights(weights.where, weights.shapes, read)
    model = source.build(tokens_BS.shape[1]).eval()
    materialize_buffers(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    read_later = {
        f"{name}.{leaf}" for name, module in linears.items() for leaf, _ in module.named_parameters()
    }
    read_now = [name for name in weights.shapes if name not in read_later]
    read_parameters(model, rounded, read_now, torch.float32, "cpu")

    for name, module in linears.items():

        def fill(module: nn.Module, _: object, name: str = name) -> None:
            leaves = [f"{name}.{leaf}" for leaf, _ in module.named_parameters()]
            read_parameters(model, rounded, leaves, torch.float32, "cpu")

        def drop(module: nn.Module, *_: object) -> None:
            module.to("meta")

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(drop)
    logits: Tensor = model(tokens_BS)
    return logits


def transformers_logits(folder: Path, tokens_BS: Tensor) -> Tensor | str:
    """transformers' logits [B, S, V] of the model in `folder`, in float32; or why they are not computed."""
    if importlib.util.find_spec("transformers") is None:
        return "it is not installed"
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    need = 4 * stored  # bfloat16 to float32, with two copies while it loads
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if need > free:
        return f"it would need {need / 1e9:.1f} GB of memory for the model, and {free / 1e9:.1f} GB are free"
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    with torch.no_grad():
        logits: Tensor = model.float().eval()(tokens_BS).logits
    return logits


def compare_logits(got: Tensor, expected: Tensor) -> LogitsComparison:
    """Compare the logits of two models; NaN exceeds any tolerance."""
    difference = (got - expected).abs().max().item()
    return LogitsComparison(difference, difference <= TOLERANCE * max(1.0, expected.abs().max().item()))
