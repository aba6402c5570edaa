"""Compiled layers under tensor parallelism have the gradients that eager ones have."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from octavo import config
from octavo.config import ConfigError
from octavo.distributed.tensor_parallel import loss_context
from octavo.models.init import init_weights
from octavo.models.parallelize import apply_tensor_parallel
from octavo.models.transformer import Transformer
from octavo.tokenizer import build_tokenizer
from octavo.train import quantization
from octavo.train.build_model import model_args
from octavo.train.step import cross_entropy_sum
from tests.helpers import ranks
from tests.models.small_llama import small


def gradients(*, compiled: bool) -> dict[str, object]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    with torch.device("meta"):
        model = Transformer(small(vocab_size=128))
    apply_tensor_parallel(model, quantization.tensor_parallel_styles(mesh, loss_parallel=True))
    for layer in model.layers.values() if compiled else ():
        layer.compile(fullgraph=True, backend="aot_eager")
    model.to_empty(device="cpu")
    init_weights(model, seed=1)
    tokens, labels = torch.randint(128, (2, 2, 16), generator=torch.Generator().manual_seed(2)).unbind(0)
    with loss_context(parallel=True):
        cross_entropy_sum(model(tokens), labels).backward()
    return {name: parameter.grad.full_tensor().numpy() for name, parameter in model.named_parameters()}


def both() -> tuple[dict[str, object], dict[str, object]]:
    return gradients(compiled=False), gradients(compiled=True)


def test_compiled_layers_hand_the_embedding_its_gradient():
    for eager, compiled in ranks.run(2, both):
        assert "tok_embeddings.weight" in eager
        assert eager.keys() == compiled.keys()
        for name, gradient in eager.items():
            torch.testing.assert_close(
                *map(torch.from_numpy, (compiled[name], gradient)), rtol=1e-5, atol=1e-5
            )


def test_a_degree_that_divides_no_model_is_told_with_the_sum():
    job = config.load(["--parallelism.tensor_parallel_degree=3"])
    message = (
        r"degree = 3: the model has 16 heads \(16 / 3 = 5.33\) and .* which do not divide evenly; degrees "
        "that divide them: 1, 2, 4, 8, 16"
    )
    with pytest.raises(ConfigError, match=message):
        model_args(job, build_tokenizer(job.model.hf_assets_path))
