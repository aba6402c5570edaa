"""`float8.layer_recipes`: reading them, the file that holds them, and what is refused before a start."""

import pytest

from octavo.config import ConfigError, load
from octavo.config.layer_recipes import LayerRecipe, layer_recipes, matching, parse, recipes_named
from octavo.preflight import check

FLOAT8 = ["--model.converters=float8"]


def tuned(folder, text):
    path = folder / "tuned.toml"
    path.write_text(text)
    return f"--float8.layer_recipes_file={path}"


def test_element():
    assert parse("layers.*.attention.wk=high_precision") == LayerRecipe("layers.*.attention.wk", None)
    assert parse(" output = rowwise ") == LayerRecipe("output", "rowwise")
    assert parse("output=rowwise").text == "output=rowwise"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output", "must be PATTERN=RECIPE"),
        ("=rowwise", "must be PATTERN=RECIPE"),
        ("output=rowise", "no recipe is called 'rowise'.*did you mean 'rowwise'"),
        ("output=", "no recipe is called ''"),
    ],
)
def test_wrong_element(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_the_last_match_counts():
    recipes = [parse("layers.*=rowwise"), parse("layers.[01].*=tensorwise"), parse("layers.0.*.wk=blockwise")]
    found = {
        name: matching(recipes, name) for name in ("layers.0.a.wk", "layers.1.a.wk", "layers.2.a", "out")
    }
    assert [r and r.recipe for r in found.values()] == ["blockwise", "tensorwise", "rowwise", None]


def test_file_becomes_the_key(tmp_path):
    flag = tuned(tmp_path, '# made by octavo tune\n[float8]\nlayer_recipes = ["a.*=rowwise",\n "b=mxfp8"]\n')
    job = load([*FLOAT8, flag])
    assert job.float8.layer_recipes == ["a.*=rowwise", "b=mxfp8"]
    assert [r.recipe for r in layer_recipes(job.float8)] == ["rowwise", "mxfp8"]
    assert job.where["float8.layer_recipes"].endswith("tuned.toml:3")
    assert recipes_named(job.float8) == ["tensorwise", "rowwise", "mxfp8"]
    # A run's record holds both; it loads again as it is, but not with other recipes.
    again = load([*FLOAT8, flag, "--float8.layer_recipes=a.*=rowwise,b=mxfp8"])
    assert again.float8 == job.float8
    with pytest.raises(ConfigError, match="float8.layer_recipes differs from the one in"):
        load([*FLOAT8, flag, "--float8.layer_recipes=a.*=rowwise"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no float8.layer_recipes; octavo tune writes such a file"),
        (
            "[float8]\nlayer_recipes = []\nrecipe_name = 'rowwise'",
            "tuned.toml:3: float8.recipe_name does not",
        ),
        ("[float8]\nlayer_recipe = []", "tuned.toml:2: float8.layer_recipe: unknown key"),
        ("[float8", "not valid TOML"),
    ],
)
def test_wrong_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load([*FLOAT8, tuned(tmp_path, text)])


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"--float8.layer_recipes_file=.*none.toml: .*cannot be read"):
        load([*FLOAT8, f"--float8.layer_recipes_file={tmp_path / 'none.toml'}"])


def test_checks(tmp_path):
    with pytest.raises(ConfigError, match=r"float8.layer_recipes \(--float8.layer_recipes\): .*'rowise'"):
        check(load([*FLOAT8, "--float8.layer_recipes=output=rowise"]), world_size=1)
    with pytest.raises(ConfigError, match="--float8.layer_recipes would have no effect"):
        check(load(["--float8.layer_recipes=output=rowwise"]), world_size=1)
    flag = tuned(tmp_path, '[float8]\nlayer_recipes = ["output=rowwise"]\n')
    with pytest.raises(ConfigError, match="--float8.layer_recipes_file would have no effect"):
        check(load([flag]), world_size=1)


def test_a_float8_gather_needs_one_recipe_that_can():
    gather = [*FLOAT8, "--float8.enable_fsdp_float8_all_gather", "--float8.recipe_name=rowwise"]
    with pytest.raises(ConfigError, match=r"rowwise \(--float8.recipe_name\) casts a weight differently"):
        check(load(gather), world_size=2)
    check(load([*gather, "--float8.layer_recipes=layers.*=tensorwise"]), world_size=2)
