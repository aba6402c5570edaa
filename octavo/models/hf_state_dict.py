"""Conversion of state dicts to Hugging Face's transformers and back. A family's `HubFormat` has the names.

Besides the names, the order of rows differs where the rotary embedding turns their products: Hugging Face
rotates the halves of a head, (x[i], x[i + E/2]), while octavo rotates neighbours, (x[2i], x[2i+1]). So within
each head, our row 2i is their row i, and our row 2i+1 is their row i + E/2. That holds for wq and wk, and for
the norms of their heads. Experts are one tensor each there, and one stack here.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.families import Family
from octavo.families.model_args import ModelArgs
from octavo.models.rope import rope_frequencies

_BUFFER = "rotary_emb.inv_freq"  # saved by old versions of transformers


def _pairs_to_halves(rows: Tensor, head_width: int) -> Tensor:
    """Our row order within each head -> Hugging Face's."""
    return rows.unflatten(0, (-1, head_width // 2, 2)).transpose(1, 2).flatten(0, 2)


def _halves_to_pairs(rows: Tensor, head_width: int) -> Tensor:
    """Hugging Face's row order within each head -> ours."""
    return rows.unflatten(0, (-1, 2, head_width // 2)).transpose(1, 2).flatten(0, 2)


def to_hf(family: Family, state: Mapping[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Our state dict in Hugging Face's names and row order; `ValueError` for an unknown name."""
    stored = family.format_of(args)
    renamed = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if name in stored.outside:
            renamed[stored.outside[name]] = tensor
        elif layer and layer[2] in stored.layer:
            if layer[2] in stored.rotated:
                tensor = _pairs_to_halves(tensor, args.head_width)
            theirs = f"model.layers.{layer[1]}.{stored.layer[layer[2]]}"
            parts = enumerate(tensor) if "{}" in theirs else [(0, tensor)]
            renamed |= {theirs.format(number): part for number, part in parts}
        else:
            raise ValueError(f"{name!r} is not the name of a parameter of {family.name}")
    return renamed


def from_hf(family: Family, state: Mapping[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Hugging Face's state dict in our names and row order; `ValueError` for an unknown name, or for experts
    of a layer that are not all there.

    Drops rotary buffers, lm_head where embeddings are tied, and layers after the model's, which predict
    several tokens (DeepSeek-V3).
    """
    stored = family.format_of(args)
    outside = {theirs: ours for ours, theirs in stored.outside.items()}
    inside = {theirs: ours for ours, theirs in stored.layer.items()}
    renamed = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        expert = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", layer[2]) if layer else None
        theirs = f"{expert[1]}{{}}{expert[3]}" if expert else layer and layer[2]
        if name in outside:
            if not (args.tie_embeddings and name == "lm_head.weight"):
                renamed[outside[name]] = tensor
        elif stored.extra_layers and layer and int(layer[1]) >= args.n_layers:
            continue
        elif layer and theirs in inside:
            ours = inside[theirs]
            if ours in stored.rotated:
                tensor = _halves_to_pairs(tensor, args.head_width)
            ours = f"layers.{layer[1]}.{ours}"
            if expert:
                stacks.setdefault(ours, {})[int(expert[2])] = tensor
            else:
                renamed[ours] = tensor
        elif not name.endswith(_BUFFER):
            raise ValueError(
                f"{name!r} is not the name of a parameter of Hugging Face's {stored.architecture}"
            )
    for ours, experts in stacks.items():
        assert args.moe is not None
        if sorted(experts) != list(range(args.moe.n_experts)):
            raise ValueError(f"{ours}: {len(experts)} of {args.moe.n_experts} experts")
        renamed[ours] = torch.stack([experts[number] for number in range(len(experts))])
    return renamed


def redundant(family: Family, name: str, args: ModelArgs) -> str | Tensor | None:
    """What a tensor that `from_hf` drops must equal: another tensor, by name, or values; itself, if it may be
    anything; else None.
    """
    stored = family.format_of(args)
    outside, layer = stored.outside, re.match(r"model\.layers\.(\d+)\.", name)
    if stored.extra_layers and layer and int(layer[1]) >= args.n_layers:
        return name
    if args.tie_embeddings and name == outside["output.weight"]:
        return outside["tok_embeddings.weight"]
    return rope_frequencies(args) if name.endswith(_BUFFER) else None
