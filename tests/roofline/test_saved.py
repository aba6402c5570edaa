"""What the roofline says that a layer keeps for backward is what compiled layers keep."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from octavo.families import ModelArgs
from octavo.float8 import Float8LinearConfig, convert_to_float8_training
from octavo.models.rope import rope_table
from octavo.models.transformer import TransformerBlock
from octavo.roofline import Block
from octavo.train.quantization import keep_casts_under_compile
from tests.float8.graphs import compile_and_capture, compiles

T = 128
ARGS = ModelArgs(dim=256, n_layers=1, n_heads=8, n_kv_heads=2, hidden_dim=896, vocab_size=256, max_seq_len=T)


class Layer(nn.Module):
    def __init__(self, recipe: str | None) -> None:
        super().__init__()
        self.layer = TransformerBlock(ARGS).to(torch.bfloat16)
        self.register_buffer("rope", rope_table(ARGS), persistent=False)
        if recipe is not None:
            config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
            convert_to_float8_training(self.layer, config=config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, self.rope)


@compiles
@pytest.mark.parametrize(
    ("recipe", "way"),
    [
        (None, "all"),
        ("rowwise", "compiled"),
        pytest.param("rowwise_with_gw_hp", "all", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_keep_what_is_told(recipe: str | None, way: str) -> None:
    keep_casts_under_compile()
    layer = Layer(recipe)
    graphs = compile_and_capture(layer, torch.randn(1, T, ARGS.dim, dtype=torch.bfloat16).requires_grad_())
    fixed = {tuple(t.shape) for t in (*layer.parameters(), *layer.buffers())}
    fixed |= {shape[::-1] for shape in fixed}
    kept = [t for t in graphs.saved() if tuple(t.shape) not in fixed]
    block = Block(ARGS.dim, ARGS.dim, ARGS.n_kv_heads * ARGS.head_width, ARGS.hidden_dim)
    expected = block.saved(T)[way]
    assert sum(t.numel() * t.element_size() for t in kept) == pytest.approx(expected, rel=0.03)
