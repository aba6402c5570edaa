"""What a run takes up of a checkpoint, and what it says when it goes on from one."""

from collections.abc import Mapping, Set
from typing import Any


def without(state: Mapping[str, Any], excluded: Set[str]) -> dict[str, Any]:
    """A checkpoint's state less what `checkpoint.exclude_from_loading` names, which "not_exact" tells.

    Without train_state the run begins at step 0; without dataloader at the start of the data.
    """
    left = {**state, "not_exact": {**state["not_exact"], **dict.fromkeys(sorted(excluded), "excluded")}}
    if "dataloader" in excluded:
        del left["data"]
    if "train_state" in excluded:
        left |= {"step": 0, "tokens_seen": 0}
        left.pop("guard", None)
    return left


def resumed(step: int, tokens: int, not_exact: Mapping[str, str | None]) -> str:
    """The line that says where a run goes on, and what is not as it was: part -> why, or None."""
    parts = {"data position": None, "RNG": None, **not_exact}
    words = [f"{part} not exact ({why})" if why else f"{part} exact" for part, why in parts.items()]
    return f"resumed step {step}, tokens {tokens}, {', '.join(words)}"
