"""What a run says when it goes on from a checkpoint."""

from collections.abc import Mapping


def resumed(step: int, tokens: int, not_exact: Mapping[str, str | None]) -> str:
    """The line that says where a run goes on, and what is not as it was: part -> why, or None."""
    parts = {"data position": None, "RNG": None, **not_exact}
    words = [f"{part} not exact ({why})" if why else f"{part} exact" for part, why in parts.items()]
    return f"resumed step {step}, tokens {tokens}, {', '.join(words)}"
