"""Whether an exported model computes what the checkpoint's model computes: logits of both, compared.

Ours are computed layer by layer: a linear's weight is read when it is called and dropped after, so that a
model larger than the memory can be checked. transformers holds the whole model; where that cannot fit, it
is left out and the report says so.

Both sides compute in float32, from the weights in the exported dtype, so what is compared is the export and
not the rounding to bfloat16.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.hf.model_sources import ModelSource
from octavo.hf.stored_weights import Weights, allocate, place

TOLERANCE = 1e-4
"""Of the largest difference between logits, for logits up to 1; relative to the largest logit beyond."""

POSITIONS = 64


@dataclass(frozen=True)
class Comparison:
    """The largest absolute difference between two models' logits, and whether it is within the tolerance."""

    difference: float
    within: bool


def sample_tokens(source: ModelSource) -> Tensor:
    """A fixed row of random tokens, int64 [1, S]."""
    generator = torch.Generator().manual_seed(0)
    length = min(POSITIONS, source.context)
    return torch.randint(source.tokenizer.vocab_size, (1, length), generator=generator)


@torch.no_grad()
def own_logits(source: ModelSource, weights: Weights, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [B, S, V] of our model with `weights` rounded to `dtype`, in float32 on the CPU."""

    def read(name: str) -> Tensor:
        return weights.read(name).to(dtype)

    rounded = Weights(weights.where, weights.shapes, read)
    model = source.build(tokens_BS.shape[1]).eval()
    allocate(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    of_linears = {
        f"{name}.{leaf}" for name, module in linears.items() for leaf, _ in module.named_parameters()
    }
    place(model, rounded, [name for name in weights.shapes if name not in of_linears], torch.float32, "cpu")

    for name, module in linears.items():

        def fill(module: nn.Module, _: object, name: str = name) -> None:
            leaves = [f"{name}.{leaf}" for leaf, _ in module.named_parameters()]
            place(model, rounded, leaves, torch.float32, "cpu")

        def drop(module: nn.Module, *_: object) -> None:
            module.to("meta")

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(drop)
    logits: Tensor = model(tokens_BS)
    return logits


def transformers_logits(folder: Path, tokens_BS: Tensor) -> Tensor | str:
    """Logits [B, S, V] of transformers with the model in `folder`, in float32; or why there are none."""
    if importlib.util.find_spec("transformers") is None:
        return "it is not installed"
    need = 4 * sum(
        file.stat().st_size for file in folder.glob("*.safetensors")
    )  # float32 from bfloat16, twice
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if need > have:
        return f"it would hold the whole model, some {need / 1e9:.1f} GB, and {have / 1e9:.1f} GB are free"
    import transformers

    quiet = transformers.utils.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    with torch.no_grad():
        logits: Tensor = model.float().eval()(tokens_BS).logits
    return logits


def compare(got: Tensor, expected: Tensor) -> Comparison:
    """Logits of two models; NaN anywhere is beyond any tolerance."""
    difference = (got - expected).abs().max().item()
    return Comparison(difference, difference <= TOLERANCE * max(1.0, expected.abs().max().item()))
