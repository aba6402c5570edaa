"""Registers `shallow`: the debug model half as wide, with two or four layers, for fast tests.

`launching.shallow` has the flags that select it.
"""

from dataclasses import replace

from octavo import models
from octavo.models.llama3 import FLAVORS, SPEC

NARROW = replace(FLAVORS["debugmodel"], dim=128, n_heads=8, n_kv_heads=8, hidden_dim=384)

models.register(
    replace(
        SPEC,
        name="shallow",
        flavors={str(layers): replace(NARROW, n_layers=layers) for layers in (2, 4)},
    )
)
