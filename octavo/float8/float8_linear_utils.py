"""`convert_to_float8_training` under torchao's import path."""

from octavo.float8.convert import auto_filter_for_recipe as _auto_filter_for_recipe
from octavo.float8.convert import convert_to_float8_training

__all__ = ["_auto_filter_for_recipe", "convert_to_float8_training"]
