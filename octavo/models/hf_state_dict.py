"""Conversion of state dicts to Hugging Face's transformers and back. A family's `HubFormat` has the names.

Besides the names, the order of rows differs where the rotary embedding turns their products: Hugging Face
rotates the halves of a head, (x[i], x[i + E/2]), while octavo rotates neighbours, (x[2i], x[2i+1]). So within
each head, our row 2i is their row i, and our row 2i+1 is their row i + E/2. That holds for wq and wk, and for
the norms of their heads.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from octavo.families import Family
from octavo.families.model_args import ModelArgs

_BUFFER = "rotary_emb.inv_freq"  # saved by old versions of transformers


def _pairs_to_halves(rows: Tensor, head_width: int) -> Tensor:
    """Our row order within each head -> Hugging Face's."""
    return rows.unflatten(0, (-1, head_width // 2, 2)).transpose(1, 2).flatten(0, 2)


def _halves_to_pairs(rows: Tensor, head_width: int) -> Tensor:
    """Hugging Face's row order within each head -> ours."""
    return rows.unflatten(0, (-1, 2, head_width // 2)).transpose(1, 2).flatten(0, 2)


def to_hf(family: Family, state: Mapping[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Our state dict in Hugging Face's names and row order; `ValueError` for an unknown name."""
    stored = family.hub_format
    renamed = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if name in stored.outside:
            renamed[stored.outside[name]] = tensor
        elif layer and layer[2] in stored.layer:
            if layer[2] in stored.rotated:
                tensor = _pairs_to_halves(tensor, args.head_width)
            renamed[f"model.layers.{layer[1]}.{stored.layer[layer[2]]}"] = tensor
        else:
            raise ValueError(f"{name!r} is not the name of a parameter of {family.name}")
    return renamed


def from_hf(family: Family, state: Mapping[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Hugging Face's state dict in our names and row order; `ValueError` for an unknown name.

    Drops rotary buffers, and lm_head where embeddings are tied.
    """
    stored = family.hub_format
    outside = {theirs: ours for ours, theirs in stored.outside.items()}
    inside = {theirs: ours for ours, theirs in stored.layer.items()}
    renamed = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if name in outside:
            if not (args.tie_embeddings and name == "lm_head.weight"):
                renamed[outside[name]] = tensor
        elif layer and layer[2] in inside:
            ours = inside[layer[2]]
            if ours in stored.rotated:
                tensor = _halves_to_pairs(tensor, args.head_width)
            renamed[f"layers.{layer[1]}.{ours}"] = tensor
        elif not name.endswith(_BUFFER):
            raise ValueError(
                f"{name!r} is not the name of a parameter of Hugging Face's {stored.architecture}"
            )
    return renamed
