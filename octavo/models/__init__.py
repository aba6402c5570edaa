"""The model registry: one `ModelSpec` per model family. The trainer uses a model only through its spec.

To add a model:

1. Write it as a plain `nn.Module`: tokens [B, S] (int64) -> logits [B, S, vocab]. It needs
   `init_rule(parameter name) -> InitRule` (`init.py`), and `init_buffers()` if it has buffers, because it is
   built on the meta device.
2. Describe it by a `ModelSpec` (`model_spec.py`). The first six fields are required; each optional one
   enables a feature.
3. Call `register(spec)` in the module that defines it.
4. Name that module in `experimental.custom_import` and the spec in `model.name`.

`docs/your_own_model.md` walks through an example; `family_spec.py` makes the specs of the shipped families.
"""

import importlib
from collections.abc import Mapping

from octavo.config import ConfigError
from octavo.core.python_path import working_directory_last
from octavo.families import FAMILIES
from octavo.models.family_spec import spec_of
from octavo.models.model_spec import HuggingFace, Linears, ModelSpec, Pipelined

_SPECS: dict[str, ModelSpec] = {name: spec_of(family) for name, family in FAMILIES.items()}


def register(spec: ModelSpec) -> None:
    """Add a model to the registry; a second spec of the same name is a `ValueError`."""
    if spec.name in _SPECS:
        raise ValueError(f"a model named {spec.name!r} is already registered; choose another name")
    _SPECS[spec.name] = spec


def import_custom(module: str, name: str | None = None) -> None:
    """Import the user's `module` from Python's path or the working directory; do nothing for "".

    Raises:
        ConfigError: the module calls sys.exit, or registers no model called `name`.
        Exception: what the module itself raises, with a note that names the option.
    """
    if not module:
        return
    option = f"experimental.custom_import = {module}"
    try:
        with working_directory_last():
            importlib.import_module(module)
    except SystemExit as error:
        raise ConfigError(
            f"{option}: this module calls sys.exit when it is imported; move that call below "
            'if __name__ == "__main__"'
        ) from error
    except Exception as error:
        error.add_note(f"octavo: raised by {option}")
        raise
    if name is not None and name not in _SPECS:
        raise ConfigError(
            f"model.name = {name!r}: {option} registers no such model (octavo.models.register); "
            f"known: {', '.join(_SPECS)}"
        )


def get(name: str) -> ModelSpec:
    """The spec called `name`; `ConfigError` if none is registered."""
    if name not in _SPECS:
        raise ConfigError(
            f"model.name = {name!r}: no such model; known: {', '.join(_SPECS)}. To use your own model, name "
            "the module that registers it in experimental.custom_import"
        )
    return _SPECS[name]


def registered() -> Mapping[str, ModelSpec]:
    """All registered specs by name."""
    return dict(_SPECS)


__all__ = ["HuggingFace", "Linears", "ModelSpec", "Pipelined", "get", "register", "registered"]
