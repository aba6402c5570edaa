"""A checkpoint that torchtitan saved of Llama 3 gives its weights, and nothing in it is unpickled."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from octavo.config import ConfigError
from octavo.config.schema import Checkpoint, Model
from octavo.families.model_args import ModelArgs
from octavo.hf.model_sources import build_on_meta
from octavo.hf.stored_weights import shapes_of
from octavo.hf.torchtitan_checkpoint import is_torchtitan_checkpoint, open_torchtitan_weights
from octavo.hf.training_io import open_initial_weights
from octavo.models import get
from octavo.models.rope import rope_table
from tests.helpers.hostile import Touch

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process saves
ARGS = ModelArgs(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=20, hidden_dim=24, max_seq_len=8)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq, self.wo = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.wk, self.wv = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.w2 = nn.Linear(24, 16, bias=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(16), nn.RMSNorm(16)


class Titan(nn.Module):
    """Llama 3's parameters under torchtitan's names, without a forward."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings, self.output = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.layers = nn.ModuleDict({"0": Block(), "1": Block()})
        self.norm = nn.RMSNorm(16)


def save(folder, model, **others):
    """As torchtitan does: the model at the top level, beside everything else."""
    moments = {f"state.{name}.exp_avg": torch.ones_like(value) for name, value in model.items()}
    dcp.save({**model, "optimizer": moments, **others}, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_every_parameter_is_read_and_nothing_is_run(tmp_path, sentinel, prefix):
    model = Titan().state_dict()
    cos, sin = rope_table(ARGS)
    everything = {prefix + name: value for name, value in {**model, "freqs_cis": cos + 1j * sin}.items()}
    save(tmp_path, everything, train_state=Touch(sentinel), dataloader={"dp_rank_0": Touch(sentinel)})
    assert is_torchtitan_checkpoint(tmp_path)
    weights = open_torchtitan_weights(tmp_path, ARGS)
    assert weights.shapes == shapes_of(build_on_meta(get("llama3"), ARGS))
    for name, value in model.items():
        assert torch.equal(weights.read(name), value), name
    assert not sentinel.exists()


def test_rotations_of_another_model_are_refused(tmp_path):
    cos, sin = rope_table(replace(ARGS, rope_theta=10.0))
    save(tmp_path, {**Titan().state_dict(), "freqs_cis": cos + 1j * sin})
    with pytest.raises(ConfigError, match="other rotary frequencies than the model; set model.flavor"):
        open_torchtitan_weights(tmp_path, ARGS)


@pytest.mark.parametrize(("name", "only"), [("qwen3", True), ("llama3", False)])
def test_more_than_the_weights_of_llama3_is_refused(tmp_path, name, only):
    save(tmp_path / "titan", Titan().state_dict())
    settings = Checkpoint(initial_load_path=str(tmp_path / "titan"), initial_load_model_only=only)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="only llama3's weights can be loaded: set model.name"):
            open_initial_weights(settings, tmp_path, Model(name=name), ARGS)
    finally:
        dist.destroy_process_group()


def test_a_folder_of_octavo_is_none(tmp_path):
    save(tmp_path, Titan().state_dict())
    (tmp_path / "manifest.json").touch()  # its state.json is lost
    assert not is_torchtitan_checkpoint(tmp_path)
