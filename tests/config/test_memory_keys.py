"""What saves memory, and with what it does not go together: told before anything is started."""

import pytest

from octavo.config import ConfigError, load
from octavo.config.preflight import check

REFUSED = [
    (
        ["--model.fuse=on", "--parallelism.tensor_parallel_degree=2"],
        2,
        "tensor parallel weights are not fused",
    ),
    (
        ["--training.loss_chunk_tokens=64", "--parallelism.tensor_parallel_degree=2"],
        2,
        "part of the vocabulary",
    ),
    (["--training.loss_chunk_tokens=64", "--parallelism.pipeline_parallel_degree=2"], 2, "whole logits"),
    (["--training.loss_chunk_tokens=1000000"], 1, "no effect: a device has at most that many tokens"),
    (["--optimizer.name=AdamW8bit"], 2, "needs whole parameters"),
    (["--optimizer.name=Adam", "--training.dtype=bfloat16"], 1, "would lose small updates"),
    (["--optimizer.name=Adam", "--optimizer.state_dtype=bfloat16"], 1, "only AdamW has a choice"),
    (["--optimizer.state_dtype=bfloat16", "--optimizer.implementation=foreach"], 1, "PyTorch's optimizers"),
    (
        ["--model.converters=float8", "--float8.recipe_name=rowwise", "--float8.share_scales"],
        1,
        "only tensorwise",
    ),
    (["--model.converters=float8", "--model.fuse=off", "--float8.share_scales"], 1, "nothing is fused"),
]


@pytest.mark.parametrize(("flags", "world_size", "told"), REFUSED)
def test_refused(flags, world_size, told):
    with pytest.raises(ConfigError, match=told):
        check(load(flags), world_size=world_size)
