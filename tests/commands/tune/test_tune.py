"""`octavo tune` from the command line to a training run that takes its file up."""

import pytest

from octavo import cli
from octavo.commands.tune import recipe_costs
from octavo.config import load
from tests.helpers import launching

DEBUG = ["--config-file", "debug_model.toml"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    """As on a machine without one, and with a cache of the test's own."""
    import torch

    monkeypatch.setattr("octavo.commands.tune.main.pick_device", lambda: torch.device("cpu"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    out = tmp_path / "tuned.toml"
    assert cli.main(["tune", "--config-file", "llama3_8b.toml", "--out", str(out)]) == 0
    told, text = capsys.readouterr().out, out.read_text()
    for words in (told, text):
        assert (
            "ESTIMATED by the roofline model for h100: nothing was measured, as there is no GPU here" in words
        )
    assert "left out: mxfp8" in told
    recipes = load(["--float8.layer_recipes_file", str(out)]).float8.layer_recipes
    assert len(recipes) == 7
    assert not [r for r in recipes if r.endswith("=high_precision")]
    assert not (tmp_path / "cache").exists()


def test_small_layers_stay_in_high_precision(tmp_path, capsys):
    out = tmp_path / "tuned.toml"
    assert cli.main(["tune", *DEBUG, "--out", str(out), "--gpu", "H200"]) == 0
    assert "No layer is faster in float8 here" in capsys.readouterr().out
    assert out.read_text().count("=high_precision") == 7


def test_a_run_takes_the_file_up(tmp_path):
    out = tmp_path / "tuned.toml"
    argv = ["tune", *DEBUG, "--out", str(out), "--recipes=tensorwise,rowwise", "--training.seq_len=1024"]
    assert cli.main(argv) == 0
    flags = {"model.converters": "float8", "float8.filter_fqns": "output", "training.steps": 2}
    run = launching.train(tmp_path / "run", flags | {"float8.layer_recipes_file": out})
    assert run.exit_codes == [0]
    assert "Float8 training active with recipe rowwise in 42 layers" in run.log


def test_measuring(tmp_path, capsys, monkeypatch):
    """The path of a GPU, with a device that measures nothing: each size once, and then never again."""
    import torch

    measured = []

    def fake(size, candidates, device, *, emulate):
        assert emulate is False
        measured.append(size)
        fast = {name: recipe_costs.CostParts(1.0 if name == "tensorwise" else 2.0) for name in candidates}
        return fast | {"high_precision": recipe_costs.CostParts(3.0)}

    monkeypatch.setattr("octavo.commands.tune.main.pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("octavo.commands.tune.cost_cache.describe_machine", lambda device: "a GPU")
    monkeypatch.setattr(recipe_costs, "supported_recipes", lambda names, device: (list(names), {}))
    monkeypatch.setattr(recipe_costs, "measure_costs", fake)
    argv = ["tune", *DEBUG, "--out", str(tmp_path / "tuned.toml")]
    for extra, times in (([], 3), ([], 0), (["--refresh"], 3), (["--no-cache"], 3), ([], 0)):
        measured.clear()
        assert cli.main([*argv, *extra]) == 0
        assert len(measured) == times
    text = (tmp_path / "tuned.toml").read_text()
    assert "# measured on a GPU\n" in text
    assert text.count("=tensorwise") == 7
    assert "M=2048 K=256 N=768: 1000000 us, high precision 3000000 us: 3.00x" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--recipes=fp4"],
            "--recipes=fp4: 'fp4' is not a recipe; the candidates are high_precision, tensorwise",
        ),
        (["--recipes=,"], "--recipes=,: names none"),
        (["--recipes=mxfp8"], "--recipes: none of them is supported here: mxfp8: h100 has no units for it"),
        (["--gpu=tpu"], "--gpu: no GPU is called 'tpu'"),
        (["--refresh"], "--refresh would have no effect: nothing is measured, as there is no GPU here"),
        (["--no-cache", "--gpu=h100"], r"--no-cache would have no effect: nothing is measured \(--gpu\)"),
        (["--refresh", "--no-cache"], "use one of the two"),
        (["--recipes=high_precision"], "nothing to choose from; name a float8 recipe"),
        (["--float8.layer_recipes=layers.*=rowwise"], "layer_recipes has no effect on octavo tune"),
        (["--processes=0"], "--processes: expected a whole number from 1 to .*, got '0'"),
        (["--parallelism.tensor_parallel_degree=2"], "does not divide 1 process"),
        (["--out=/none/tuned.toml"], "--out=/none/tuned.toml: no such folder"),
        (["--training.sek_len=3"], "did you mean '--training.seq_len'"),
        (["--training.seq_len=0"], "must be at least 1"),
    ],
)
def test_errors(argv, message, capsys):
    import re

    assert cli.main(["tune", *DEBUG, *argv]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told


def test_a_job_must_be_named(capsys):
    assert cli.main(["tune", "--out=nowhere.toml"]) == 2
    assert "name the job to tune" in capsys.readouterr().err
