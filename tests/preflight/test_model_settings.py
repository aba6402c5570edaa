"""`model.args`: sizes in place of the flavor's, checked like any option."""

from dataclasses import replace

import pytest

from octavo import config, preflight
from octavo.config import ConfigError
from octavo.families import FAMILIES
from octavo.preflight import model_settings
from octavo.preflight.sizes import args_of

DEBUG = FAMILIES["qwen3"].flavors["debugmodel"]
SIZES = "--model.args=n_heads=6,n_kv_heads=6,dim=96"
EXPERTS = FAMILIES["qwen3"].flavors["debugmodel_moe"]
assert EXPERTS.moe is not None


def test_settings_replace_sizes():
    assert model_settings.apply(DEBUG, ["dim=384", "n_layers=8", "tie_embeddings=true", "norm_eps=1e-5"]) == (
        replace(DEBUG, dim=384, n_layers=8, tie_embeddings=True, norm_eps=1e-5)
    )
    changed = model_settings.apply(EXPERTS, ["moe.top_k=2", "moe.score=sigmoid"])
    assert changed == replace(EXPERTS, moe=replace(EXPERTS.moe, top_k=2, score="sigmoid"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dimm=3"], "no dimm; did you mean 'dim'"),
        (["dim=wide"], "dim: expected an integer, got 'wide'"),
        (["dim=0"], "dim = 0: must be more than 0"),
        (["n_layers=-1"], "n_layers = -1: must be more than 0"),
        (["moe.top_k=99999999999"], "at most"),
        (["rope_theta=nan"], "rope_theta = nan"),
        (["dim"], "'dim': expected NAME=VALUE"),
        (["dim=8", "dim=16"], "sets dim twice"),
        (["moe=3"], "moe cannot be set; set its fields"),
        (["rope_scaling.factor=2"], "this flavor has no rope_scaling"),
        (["dim.width=3"], "this flavor has no dim"),
        (["latent=1"], "latent cannot be set; set its fields"),
        (["latent.kv_rank=1"], "this flavor has no latent"),
        (["max_seq_len=9"], "follows from training.seq_len"),
        (["moe.score=relu"], "'relu' is not one of softmax, sigmoid"),
        (["head_dim=31"], "a head of 31"),
        (["head_dim=0", "dim=100"], "6 heads do not divide dim 100"),
        (["n_kv_heads=4"], "n_heads 6 must be a multiple of n_kv_heads 4"),
        (["moe.top_k=17"], "top_k 17 of 16 experts"),
        (["moe.groups=16"], "16 groups of 16 experts"),
        (["moe.groups=3"], "3 groups, 1 of them kept, do not divide 16 experts"),
    ],
)
def test_a_wrong_setting_is_one_error(settings, message):
    with pytest.raises(ConfigError) as error:
        model_settings.apply(EXPERTS, settings)
    assert message in str(error.value)


@pytest.mark.parametrize("wanted", [DEBUG, EXPERTS, *FAMILIES["qwen3"].flavors.values()])
@pytest.mark.parametrize("start", [DEBUG, EXPERTS])
def test_settings_between_two_models_make_one_of_the_other(start, wanted):
    settings = model_settings.between(start, wanted)
    assert (settings is None) == ((start.moe is None) != (wanted.moe is None))
    if settings is not None:
        made = model_settings.apply(start, settings)
        assert replace(made, max_seq_len=0) == replace(wanted, max_seq_len=0)


def test_the_launcher_checks_layouts_with_the_changed_sizes():
    job = config.load([SIZES, "--parallelism.tensor_parallel_degree=4"])
    args = args_of(job)
    assert args is not None
    assert (args.n_heads, args.dim) == (6, 96)
    with pytest.raises(ConfigError, match="the model has 6 heads"):
        preflight.check(job, world_size=4)
    job = config.load(["--model.args=n_headss=6"])
    with pytest.raises(ConfigError, match="model.args: this model has no n_headss"):
        preflight.check(job, world_size=1)
