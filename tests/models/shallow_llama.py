"""The debug model with fewer layers: its layers are alike, so what holds of two of them in CI is measured for
six by hand.
"""

from dataclasses import replace

from octavo import models
from octavo.models.llama3 import FLAVORS, SPEC

models.register(
    replace(
        SPEC,
        name="shallow",
        flavors={str(layers): replace(FLAVORS["debugmodel"], n_layers=layers) for layers in (2, 4)},
    )
)


def shallow(layers: int) -> dict[str, str]:
    """Flags that train it with so many layers."""
    return {"experimental.custom_import": __name__, "model.name": "shallow", "model.flavor": str(layers)}
