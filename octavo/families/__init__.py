"""The shipped model families, as data: sizes, and how Hugging Face stores them. Free of torch.

`octavo/models` builds a model from a `ModelArgs`; nothing there asks for a family's name. To add a family,
write its file, name it here, and put its TOML files into `octavo/models/NAME/train_configs/`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from octavo.families import deepseek_v3, llama3, qwen3
from octavo.families.family import Family
from octavo.families.model_args import ModelArgs

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (llama3.FAMILY, qwen3.FAMILY, deepseek_v3.FAMILY)}
)
"""model.name -> family."""

__all__ = ["FAMILIES", "Family", "ModelArgs"]
