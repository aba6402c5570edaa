"""Keeps access tokens out of logs, messages and dumps.

A token comes from the environment, but may end up elsewhere: in a path that holds a URL, in a description, in
a library's error. So everything that octavo logs, prints or writes of its configuration goes through
`redact`. It removes the values of the variables that hold tokens, and anything that looks like a Hugging Face
token.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
"""Environment variables whose values are secret."""

SHOWN = "***"

_SHORTEST = 8  # a shorter value is no token, and removing it everywhere would make text unreadable
_LOOKS_LIKE_ONE = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def redact(value: Any) -> Any:
    """`value` without tokens, also within lists and dicts (keys too); other types are returned unchanged."""
    if isinstance(value, str):
        return _redact_text(value)
    if isinstance(value, Mapping):
        return {redact(key): redact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redact(item) for item in value)
    return value


def _redact_text(text: str) -> str:
    for variable in VARIABLES:
        token = os.environ.get(variable, "").strip()
        if len(token) >= _SHORTEST:
            text = text.replace(token, SHOWN)
    return _LOOKS_LIKE_ONE.sub(SHOWN, text)
