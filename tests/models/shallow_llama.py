"""The debug model with fewer layers, half as wide: its layers are alike, so what holds of two of them in CI
is measured for six by hand. `runs.shallow` has the flags; the process that imports this has one more model.
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
