"""The load of experts in a run: over all processes' tokens, written for each layer."""

import json

import pytest

from tests.helpers import launching

EXPERTS = {
    **launching.shallow(2),
    "model.name": "shallow_qwen3_moe",
    "training.global_batch_size": 8,
    "training.local_batch_size": 2,
    "training.steps": 2,
}


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """Lines of experts.jsonl by the number of processes."""
    found = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"world{world}")
        assert launching.train(folder, EXPERTS, world=world).exit_codes == [0] * world
        found[world] = [json.loads(line) for line in (folder / "experts.jsonl").read_text().splitlines()]
    return found


def test_each_layer_and_step_has_the_share_of_each_expert(loads):
    lines = loads[1]
    assert [(line["step"], line["layer"]) for line in lines] == [
        (step, layer) for step in (1, 2) for layer in ("layers.0", "layers.1")
    ]
    for line in lines:
        assert len(line["shares"]) == 8
        assert sum(line["shares"]) == pytest.approx(1)
        assert line["largest"] == pytest.approx(8 * max(line["shares"]))


def test_the_load_is_that_of_all_processes(loads):
    assert loads[2][:2] == loads[1][:2]  # of the first step: later weights differ by rounding
