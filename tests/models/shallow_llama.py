"""Registers `shallow`: the debug model half as wide, with two or four layers, for fast tests; and
`shallow_FAMILY`, the same of each other family, and of its debug model with experts `shallow_FAMILY_moe`.

`launching.shallow` has the flags that select them.
"""

from dataclasses import replace

from octavo import models
from octavo.families import FAMILIES, ModelArgs


def _narrow(debug: ModelArgs, layers: int) -> ModelArgs:
    moe = debug.moe and replace(debug.moe, n_experts=8, top_k=2, hidden_dim=96)
    groups = 8 if debug.n_kv_heads == debug.n_heads else 4
    sizes = {"dim": 128, "n_layers": layers, "n_heads": 8, "n_kv_heads": groups, "hidden_dim": 384}
    if debug.latent is not None:
        sizes["n_kv_heads"] = 8
    return replace(debug, moe=moe, **sizes)


def _name(family: str, flavor: str) -> str:
    name = flavor.replace("debugmodel", f"shallow_{family}")
    return "shallow" if name == "shallow_llama3" else name


for family, data in FAMILIES.items():
    for flavor, debug in data.flavors.items():
        if flavor.startswith("debugmodel"):
            narrow = {str(layers): _narrow(debug, layers) for layers in (2, 4)}
            models.register(replace(models.get(family), name=_name(family, flavor), flavors=narrow))
