"""The debug model with fewer layers: its layers are alike, so what holds of two of them in CI is measured for
six by hand. `runs.shallow` has the flags; the process that imports this has one more model.
"""

from dataclasses import replace

from octavo import models
from octavo.models.llama3 import FLAVORS, SPEC

models.register(
    replace(
        SPEC,
        name="shallow",
        hugging_face=None,
        flavors={str(layers): replace(FLAVORS["debugmodel"], n_layers=layers) for layers in (2, 4)},
    )
)
