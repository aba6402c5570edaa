"""What a model must know of its tokenizer, also where that is not at hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from octavo import models
from octavo.config import ConfigError, JobConfig, names
from octavo.tokenizer import build_tokenizer


def tokenizer_of(job: JobConfig) -> Any:
    """The job's tokenizer; or, where it has not been fetched, one that fits the model's own vocabulary.

    `ConfigError` where the model takes its vocabulary from the tokenizer.
    """
    given = job.model.hf_assets_path
    if given in names.TOKENIZERS or Path(given).expanduser().exists():
        return build_tokenizer(given)
    args = models.get(job.model.name).args(job.model.flavor)
    vocabulary = getattr(args, "vocab_size", 0)
    if not vocabulary:
        raise ConfigError(
            f"model.hf_assets_path = {given!r}: no such tokenizer, and {job.model.flavor} takes its "
            "vocabulary from it"
        )
    return SimpleNamespace(vocab_size=vocabulary, eos_id=vocabulary - 1, bos_id=0)
