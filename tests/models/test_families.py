"""Each family against transformers' own class, and against the published sizes."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from octavo import models
from octavo.families import FAMILIES, ModelArgs
from octavo.hf.safetensors_folder import find_tensors, read_tensor, write_json, write_shards
from octavo.hf.stored_weights import saved_tensors
from octavo.models.decode import Decoder
from octavo.models.init import init_weights
from octavo.models.transformer import Transformer
from tests.models.small_llama import SMALL, noisy

TOTALS = {
    "llama3 1B": 1_235_814_400,
    "llama3 3B": 3_212_749_824,
    "llama3 8B": 8_030_261_248,
    "llama3 70B": 70_553_706_496,
    "llama3 405B": 405_853_388_800,
    "qwen3 0.6B": 596_049_920,
    "qwen3 1.7B": 1_720_574_976,
    "qwen3 4B": 4_022_468_096,
    "qwen3 8B": 8_190_735_360,
    "qwen3 14B": 14_768_307_200,
    "qwen3 32B": 32_762_123_264,
    "qwen3 30B-A3B": 30_532_122_624,
    "qwen3 235B-A22B": 235_093_634_560,
    "deepseek_v3 V2-Lite": 15_706_484_224,
    "deepseek_v3 Moonlight": 15_960_110_208,
    "deepseek_v3 671B": 671_026_419_200,
    "deepseek_v3 K2": 1_026_408_232_448,
}
PUBLISHED = [
    f"{name} {flavor}"
    for name, family in FAMILIES.items()
    for flavor, args in family.flavors.items()
    if args.vocab_size
]
DEBUG = [
    f"{name} {flavor}"
    for name, family in FAMILIES.items()
    for flavor, args in family.flavors.items()
    if not args.vocab_size
]


def hugging_face(family: str) -> models.HuggingFace:
    stored = models.get(family).hugging_face
    assert stored is not None
    return stored


@pytest.fixture(params=SMALL)
def case(request) -> tuple[models.HuggingFace, ModelArgs]:
    family, args = SMALL[request.param]
    return hugging_face(family), args


@pytest.mark.parametrize("which", PUBLISHED)
def test_sizes_are_the_published_ones(which):
    name, flavor = which.split()
    with torch.device("meta"):
        model = Transformer(replace(FAMILIES[name].flavors[flavor], max_seq_len=8))
    assert sum(tensor.numel() for _, tensor in saved_tensors(model)) == TOTALS[which.removesuffix("-3.0")]


def test_logits_equal_transformers(case, tmp_path):
    stored, args = case
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**stored.to_config(args))).eval()
    assert [type(theirs).__name__] == stored.to_config(args)["architectures"]
    with torch.no_grad():
        for p in theirs.parameters():  # with their small initial weights attention would hardly matter
            p.copy_(torch.randn_like(p) * 0.2)
    ours = Transformer(args)
    theirs.save_pretrained(tmp_path)
    tensors = {name: read_tensor(where, name) for name, where in find_tensors(tmp_path).items()}
    ours.load_state_dict(stored.from_names(tensors, args), strict=True)
    tokens = torch.randint(args.vocab_size, (3, args.max_seq_len))
    with torch.no_grad():
        expected, got = theirs(tokens).logits, ours(tokens)
    assert expected.abs().max() > 1
    assert (got - expected).abs().max() < 1e-4


def test_state_dicts_convert_to_hugging_face_and_back(case):
    stored, args = case
    model = Transformer(args)
    init_weights(model, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))  # norms are all ones otherwise
    back = stored.from_names(stored.to_names(model.state_dict(), args), args)
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_config_json_round_trip(case):
    stored, args = case
    assert stored.from_config(stored.to_config(args)) == args


def test_what_transformers_writes_means_the_same(case):
    stored, args = case
    assert stored.from_config(AutoConfig.for_model(**stored.to_config(args)).to_dict()) == args


@pytest.mark.parametrize("which", PUBLISHED)
def test_config_json_of_published_sizes(which):
    name, flavor = which.split()
    args = FAMILIES[name].flavors[flavor]
    assert hugging_face(name).from_config(hugging_face(name).to_config(args)) == args


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_name_is_named(family):
    stored, args = hugging_face(family), next(args for name, args in SMALL.values() if name == family)
    with pytest.raises(ValueError, match=f"attention.other.* {family}"):
        stored.to_names({"layers.0.attention.other": torch.zeros(1)}, args)
    with pytest.raises(ValueError, match="self_attn.other"):
        stored.from_names({"model.layers.0.self_attn.other": torch.zeros(1)}, args)


@pytest.mark.parametrize("which", DEBUG)
def test_debug_flavors_are_small(which):
    name, flavor = which.split()
    spec = models.get(name)
    with torch.device("meta"):
        model = spec.build(spec.configure(spec.args(flavor), 2048, 256))
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 7e6


def test_cached_greedy_text_equals_transformers(case, tmp_path):
    stored, args = case
    ours = noisy(args)
    write_json(tmp_path / "config.json", stored.to_config(args))
    tensors = stored.to_names(ours.state_dict(), args)
    write_shards(tmp_path, [list(tensors)], lambda name: tensors[name].clone())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = torch.randint(args.vocab_size, (1, 9))
    greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
    decode, text = Decoder(ours, capacity=40), prompt
    part = prompt
    while text.shape[1] < 29:
        part = decode(part).argmax(-1, keepdim=True)
        text = torch.cat([text, part], dim=1)
    assert torch.equal(text, expected)
