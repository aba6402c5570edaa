"""The shares of a mixture are exact, and a sample's source depends only on (seed, number)."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from octavo.core.errors import ConfigError
from octavo.data.dataloader import merge_state_dicts
from octavo.data.dataset_spec import parse_dataset
from octavo.data.mixture import BLOCK, Mixture, allocate_slots
from tests.helpers.loaders import make_loader


class Numbered:
    """Sample i of source k is (k, i)."""

    identity: Mapping[str, Any] = {}
    forward_only = False

    def __init__(self, number):
        self.number, self.description = number, f"source {number}"

    def read(self, first, count):
        return torch.tensor([[self.number, first + row] for row in range(count)])

    def state_dict(self):
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def mixture(*weights, seed=0):
    return Mixture([(str(k), weight, Numbered(k)) for k, weight in enumerate(weights)], seed=seed)


@pytest.mark.parametrize(
    ("weights", "slots"),
    [
        ((0.7, 0.3), [7000, 3000]),
        ((1, 1, 1), [3334, 3333, 3333]),
        ((1, 9999), [1, 9999]),
        ((5,), [10000]),
        ((0.5, 0.25, 0.25), [5000, 2500, 2500]),
    ],
)
def test_every_block_has_exactly_its_shares(weights, slots):
    samples = mixture(*weights).read(2 * BLOCK, BLOCK)
    assert [Counter(samples[:, 0].tolist())[k] for k in range(len(weights))] == slots
    assert allocate_slots([("x", weight) for weight in weights]) == slots


def test_each_source_provides_its_samples_once_and_in_order():
    samples = mixture(0.7, 0.3).read(0, 3 * BLOCK)
    for k in range(2):
        numbers = samples[samples[:, 0] == k, 1]
        assert torch.equal(numbers, torch.arange(len(numbers)))


def test_shares_are_nearly_exact_over_short_ranges():
    owners = mixture(0.7, 0.3).read(0, BLOCK)[:, 0].unflatten(0, (-1, 500)).sum(1)
    assert owners.min() > 110  # of 500 samples; the mean is 150, five deviations are 51
    assert owners.max() < 190


def test_samples_are_independent_of_the_order_of_reading():
    whole = mixture(0.6, 0.4, seed=3).read(0, 2 * BLOCK)
    jumping = mixture(0.6, 0.4, seed=3)
    for at in (15_000, 3, 9_999, 10_000, 12):
        assert torch.equal(jumping.read(at, 1)[0], whole[at])
    assert not torch.equal(mixture(0.6, 0.4, seed=4).read(0, 2 * BLOCK), whole)
    assert not torch.equal(whole[:BLOCK, 0], whole[BLOCK:, 0])  # another draw in each block


def test_a_share_below_one_slot_is_refused():
    with pytest.raises(ConfigError, match=r"1 with weight 1e-05 of 1.00001 would have less than one sample"):
        mixture(1, 1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_layout_sees_the_same_global_batches(tmp_path, opened, ranks, workers):
    """From text, with several epochs of the smaller source; resumed half way by the other number of ranks."""
    (tmp_path / "a.txt").write_text(" ".join(f"a{word}" for word in range(300)))
    (tmp_path / "b.txt").write_text(" ".join(f"b{word}" for word in range(60)))

    dataset = f"{tmp_path / 'a.txt'}:2,{tmp_path / 'b.txt'}:1"

    def loaders(ranks):
        sizes = {"ranks": ranks, "batch": 8 // ranks, "seq_len": 8, "workers": workers}
        opened.extend(made := [make_loader(dataset, rank=rank, **sizes) for rank in range(ranks)])
        return made

    def steps(loaders, count):
        return torch.stack([torch.cat([one.next_batch()[0] for one in loaders]) for _ in range(count)])

    one, several, later = loaders(1), loaders(ranks), loaders(1)
    expected = steps(one, 60)
    assert torch.equal(steps(several, 40), expected[:40])
    state = merge_state_dicts([loader.state_dict() for loader in several])
    assert later[0].load_state_dict(state) is None
    assert torch.equal(steps(later, 20), expected[40:])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("shakespeare", [("shakespeare", 1.0)]),
        ("shakespeare:0.7, c4:3e-1", [("shakespeare", 0.7), ("c4", 0.3)]),
        ("./a.txt:2,/data/b:1.5", [("./a.txt", 2.0), ("/data/b", 1.5)]),
        ("no_such_folder", [("no_such_folder", 1.0)]),
        ("C:/x:1,b:1", [("C:/x", 1.0), ("b", 1.0)]),
    ],
)
def test_syntax_of_a_mixture(text, parts):
    assert parse_dataset(text, ["shakespeare", "c4"]) == parts


def test_an_existing_path_is_one_source(tmp_path):
    odd = tmp_path / "a:1,b:2"
    odd.mkdir()
    assert parse_dataset(str(odd), []) == [(str(odd), 1.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:1,b", r"'b' has no weight; .*NAME:WEIGHT,NAME:WEIGHT"),
        ("a:0,b:1", r"weight '0' of a must be a number above 0"),
        ("a:1.2.3,b:1", r"weight '1\.2\.3' of a"),
        ("a:1,a:2", r"a occurs twice"),
    ],
)
def test_an_invalid_mixture(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_dataset(text, [])
