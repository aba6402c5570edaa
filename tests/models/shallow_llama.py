"""Registers `shallow`: the debug model half as wide, with two or four layers, for fast tests; and
`shallow_FAMILY`, the same of each other family.

`launching.shallow` has the flags that select them.
"""

from dataclasses import replace

from octavo import models
from octavo.families import FAMILIES, ModelArgs


def _narrow(family: str, layers: int) -> ModelArgs:
    debug = FAMILIES[family].flavors["debugmodel"]
    groups = 8 * debug.n_kv_heads // debug.n_heads
    return replace(debug, dim=128, n_layers=layers, n_heads=8, n_kv_heads=groups, hidden_dim=384)


for family in FAMILIES:
    models.register(
        replace(
            models.get(family),
            name="shallow" if family == "llama3" else f"shallow_{family}",
            flavors={str(layers): _narrow(family, layers) for layers in (2, 4)},
        )
    )
