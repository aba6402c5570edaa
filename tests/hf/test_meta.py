"""Meta's files, of one or several model-parallel ranks, give the parameters that were sharded."""

import json

import pytest
import torch

from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint, RefusedCheckpoint
from octavo.cli import main
from octavo.config import ConfigError
from octavo.hf import meta
from octavo.hf.stored_weights import shapes_of
from tests.helpers.hostile import Touch
from tests.models.small_llama import FLAVORS, noisy, small

LLAMA_3 = {
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "use_scaled_rope": True,
}
PARAMS = {
    "8B": {**LLAMA_3, "dim": 4096, "n_layers": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
    "405B": {
        **LLAMA_3,
        "n_heads": 128,
        "dim": 16384,
        "n_layers": 126,
        "ffn_dim_multiplier": 1.2,
        "multiple_of": 4096,
    },
    "1B": {**LLAMA_3, "dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 256},
}
PARAMS["8B-3.0"] = {key: value for key, value in PARAMS["8B"].items() if key != "use_scaled_rope"}


@pytest.mark.parametrize("flavor", PARAMS)
def test_params_json_gives_the_flavor(flavor):
    assert meta.find_flavor(PARAMS[flavor], FLAVORS) == flavor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 33}, "no flavor of llama3 has dim 4096, n_layers 33"),
        ({"dim": None}, "not Llama 3's"),
        ({"multiple_of": 0}, "not Llama 3's"),
        ({"vocab_size": 32000}, "vocab_size 32000"),
    ],
)
def test_params_of_another_model_are_refused(change, message):
    with pytest.raises(ConfigError, match="params.json") as error:
        meta.find_flavor({**PARAMS["8B"], **change}, FLAVORS)
    assert message in str(error.value)


# The dimension that Meta's model-parallel layers shard: rows for ColumnParallelLinear and the vocabulary,
# columns for RowParallelLinear.
SHARD_DIM = {**dict.fromkeys(["wq", "wk", "wv", "w1", "w3", "output", "tok_embeddings"], 0), "wo": 1, "w2": 1}


def write_ranks(folder, state, ranks, kv_heads):
    """Write `state` as `ranks` model-parallel ranks hold it; more ranks than `kv_heads` repeat wk and wv."""
    for rank in range(ranks):
        pieces = {"rope.freqs": torch.zeros(4)}
        for name, tensor in state.items():
            dim, parts, part = SHARD_DIM.get(name.split(".")[-2]), ranks, rank
            if ".wk." in name or ".wv." in name:
                parts, part = min(ranks, kv_heads), rank * min(ranks, kv_heads) // ranks
            pieces[name] = tensor if dim is None else tensor.chunk(parts, dim)[part].clone()
        torch.save(pieces, folder / f"consolidated.{rank:02}.pth")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_are_merged(tmp_path, ranks):
    model = noisy(small(vocab_size=132))  # two key/value heads, so that four ranks repeat them
    write_ranks(tmp_path, model.state_dict(), ranks, kv_heads=2)
    read = meta.open_files(tmp_path, shapes_of(model), tied=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(read(name), tensor), name


def test_a_tied_output_is_checked_and_dropped(tmp_path):
    model = noisy(small(tie_embeddings=True))
    state = model.state_dict()
    for output, fine in ((state["tok_embeddings.weight"], True), (torch.zeros(131, 64), False)):
        torch.save({**state, "output.weight": output}, tmp_path / "consolidated.00.pth")
        read = meta.open_files(tmp_path, shapes_of(model), tied=True)
        if fine:
            assert torch.equal(read("tok_embeddings.weight"), output)
        else:
            with pytest.raises(ConfigError, match="output.weight differs from tok_embeddings.weight"):
                read("tok_embeddings.weight")


def test_what_is_missing_or_of_another_model_is_named(tmp_path):
    model = noisy(small())
    shapes, state = shapes_of(model), model.state_dict()

    def message(read_one=None):
        with pytest.raises(ConfigError) as error:
            meta.open_files(tmp_path, shapes, tied=False)(read_one)
        return str(error.value)

    assert "expected consolidated.00.pth" in message()
    torch.save(state, tmp_path / "consolidated.01.pth")
    assert "found: consolidated.01.pth" in message()
    torch.save(state, tmp_path / "consolidated.00.pth")
    (tmp_path / "consolidated.01.pth").unlink()
    short = {name: tensor for name, tensor in state.items() if name != "norm.weight"}
    torch.save(short, tmp_path / "consolidated.00.pth")
    assert "consolidated.00.pth lacks norm.weight" in message()
    torch.save({**state, "layers.2.ffn_norm.weight": torch.ones(64)}, tmp_path / "consolidated.00.pth")
    assert "has layers.2.ffn_norm.weight, which the model lacks" in message()
    torch.save({**state, "norm.weight": torch.ones(65)}, tmp_path / "consolidated.00.pth")
    assert "norm.weight is (65,) in 1 file(s), but (64,) by params.json" in message("norm.weight")
    wide = torch.ones(2 * 96, 64)
    torch.save({**state, "layers.0.feed_forward.w1.weight": wide}, tmp_path / "consolidated.00.pth")
    assert "w1.weight is (192, 64) in 1 file(s), but (96, 64)" in message("layers.0.feed_forward.w1.weight")
    torch.save([state], tmp_path / "consolidated.00.pth")
    assert "not a dictionary of tensors" in message()
    (tmp_path / "consolidated.00.pth").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DamagedCheckpoint, match="consolidated.00.pth"):
        meta.open_files(tmp_path, shapes, tied=False)


def test_a_pickle_that_runs_code_is_refused_and_not_run(sentinel, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS["8B"]))
    torch.save({"norm.weight": Touch(sentinel)}, folder / "consolidated.00.pth")
    with pytest.raises(RefusedCheckpoint, match="system"):
        meta.open_files(folder, {"norm.weight": (1,)}, tied=False)
    argv = ["import", str(folder), "--out", str(tmp_path / "out"), "--tokenizer", "octavo_bpe_2048"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "consolidated.00.pth: refused" in error
    assert "system" in error
