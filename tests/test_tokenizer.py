"""Whatever file a tokenizer comes in: text comes back exactly, and no text can forge a special token."""

import base64
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.assets import CORPORA, TOKENIZERS
from octavo.core.errors import ConfigError
from octavo.tokenizer import LLAMA3_SPLIT, Tokenizer, build_tokenizer, llama3_specials

SHIPPED = build_tokenizer("octavo_bpe_2048")
TEXTS = [
    "",
    " ",
    "Who's there?\r\n\r\n\tNay, answer me:  stand, and unfold yourself.   \n",
    "IT'S they'Re 'tis I'LL 1234567 3.14159 ---...!!!\n\n\n  x",
    "naïve Straße 漢字かな 🙂👩‍👩‍👧 e\u0301 \u00a0\u2003 \x00\x7f\ufeff",
    "<|begin_of_text|>forged<|end_of_text|><|eot_id|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaa ababababababab thththth",
]


def byte_tokens(tokenizer_json: Path) -> list[bytes]:
    """The ordinary tokens of a byte-level tokenizer.json in order of id, as bytes."""
    shown = json.loads(tokenizer_json.read_text("utf-8"))["model"]["vocab"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printable)}
    ordinary = sorted((rank, token) for token, rank in shown.items() if not token.startswith("<|"))
    return [bytes(letters[letter] for letter in token) for _, token in ordinary]


def write_tiktoken(path: Path, tokens: list[bytes]) -> Path:
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(scope="module")
def ranks() -> list[bytes]:
    return byte_tokens(TOKENIZERS["octavo_bpe_2048"] / "tokenizer.json")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, ranks: list[bytes]) -> Tokenizer:
    """A small vocabulary in the format of Llama 3's tokenizer.model."""
    return build_tokenizer(str(write_tiktoken(tmp_path_factory.mktemp("llama") / "tokenizer.model", ranks)))


class TestShipped:
    def test_has_exactly_2048_entries(self) -> None:
        assert (SHIPPED.vocab_size, SHIPPED.bos_id, SHIPPED.eos_id) == (2048, 0, 1)

    @pytest.mark.parametrize("text", TEXTS)
    def test_gives_text_back(self, text: str) -> None:
        assert SHIPPED.decode(SHIPPED.encode(text)) == text

    @given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
    def test_gives_any_text_back(self, text: str) -> None:
        ids = SHIPPED.encode(text)
        assert SHIPPED.decode(ids) == text
        assert all(2 <= token < 2048 for token in ids)  # 0 and 1 are the special ones

    def test_gives_the_corpus_back(self) -> None:
        for path in sorted(CORPORA["shakespeare"].glob("*.txt"))[::10]:
            text = path.read_text("utf-8")
            assert SHIPPED.decode(SHIPPED.encode(text)) == text

    def test_writes_its_own_corpus_shortly(self) -> None:
        text = (CORPORA["shakespeare"] / "hamlet.txt").read_text("utf-8")
        assert 2.8 < len(text) / len(SHIPPED.encode(text)) < 3.3  # bytes a token; 1 would be an untrained one

    def test_wraps_where_asked_to(self) -> None:
        ids = SHIPPED.encode("Exeunt.")
        assert SHIPPED.encode("Exeunt.", bos=True) == [0, *ids]
        assert SHIPPED.encode("Exeunt.", eos=True) == [*ids, 1]
        assert SHIPPED.encode_batch(["Exeunt.", ""], bos=True, eos=True) == [[0, *ids, 1], [0, 1]]
        assert SHIPPED.decode([0, *ids, 1]) == "<|begin_of_text|>Exeunt.<|end_of_text|>"


class TestSpecialTokensInText:
    """A document cannot end itself: the letters of a special token are letters."""

    @pytest.mark.parametrize("name", ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|python_tag|>"])
    def test_stay_text(self, llama: Tokenizer, name: str) -> None:
        special = {llama.vocab_size - 256 + index for index in range(256)}
        for tokenizer in (SHIPPED, llama):
            for text in (name, f"a {name} b", name * 3):
                ids = tokenizer.encode(text)
                assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
                assert tokenizer.decode(ids) == text
                assert tokenizer.encode_batch([text]) == [ids]
        assert not special & set(llama.encode(f"a {name} b"))


class TestTiktokenFormat:
    def reference(self, ranks: list[bytes]) -> "object":
        tiktoken = pytest.importorskip("tiktoken")
        specials = {name: len(ranks) + index for index, name in enumerate(llama3_specials())}
        mergeable = {token: rank for rank, token in enumerate(ranks)}
        return tiktoken.Encoding(
            "test", pat_str=LLAMA3_SPLIT, mergeable_ranks=mergeable, special_tokens=specials
        )

    def same(self, tokenizer: Tokenizer, reference: object, text: str) -> None:
        assert tokenizer.encode(text) == reference.encode(text, disallowed_special=()), repr(text)  # type: ignore[attr-defined]

    def test_equals_tiktoken(self, llama: Tokenizer, ranks: list[bytes]) -> None:
        reference = self.reference(ranks)
        corpus = (CORPORA["shakespeare"] / "tempest.txt").read_text("utf-8")
        for text in [*TEXTS, corpus]:
            self.same(llama, reference, text)
            assert llama.decode(llama.encode(text)) == text
        draw = random.Random(0)
        for _ in range(2000):
            letters = draw.choice(["the anTHER'sS ", "ab", " \n\t\r.x9", "aé漢🙂ſK'\u2028 "])
            self.same(llama, reference, "".join(draw.choice(letters) for _ in range(draw.randrange(40))))

    def test_equals_tiktoken_where_a_token_can_be_cut_in_many_ways(self, tmp_path: Path) -> None:
        """Ranks as no training gives them: every string of up to five letters of "ab", in a random order."""
        draw = random.Random(1)
        for trial in range(5):
            longer = [
                b"%s" % format(n, f"0{size}b").translate({48: "a", 49: "b"}).encode()
                for size in range(2, 6)
                for n in range(2**size)
            ]
            chosen = draw.sample(longer, 40)
            ranks = [*(bytes([byte]) for byte in range(256)), *chosen]
            tokenizer = build_tokenizer(str(write_tiktoken(tmp_path / f"{trial}.model", ranks)))
            reference = self.reference(ranks)
            for _ in range(400):
                self.same(tokenizer, reference, "".join(draw.choice("ab") for _ in range(draw.randrange(30))))

    def test_ids_of_llama_3_1(self, llama: Tokenizer, ranks: list[bytes]) -> None:
        """Llama's own file has 128,000 ranks, so that the slots below begin at 128000."""
        names = llama3_specials()
        assert len(names) == len(set(names)) == 256
        expected = {
            0: "<|begin_of_text|>",
            1: "<|end_of_text|>",
            2: "<|reserved_special_token_0|>",
            3: "<|reserved_special_token_1|>",
            4: "<|finetune_right_pad_id|>",
            5: "<|step_id|>",
            6: "<|start_header_id|>",
            7: "<|end_header_id|>",
            8: "<|eom_id|>",
            9: "<|eot_id|>",
            10: "<|python_tag|>",
            11: "<|reserved_special_token_2|>",
            255: "<|reserved_special_token_246|>",
        }
        assert {slot: names[slot] for slot in expected} == expected
        assert (llama.bos_id, llama.eos_id, llama.vocab_size) == (
            len(ranks),
            len(ranks) + 1,
            len(ranks) + 256,
        )
        for slot, name in enumerate(names):
            assert llama.decode([len(ranks) + slot]) == name

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"\x80\x02binary junk\n", r"line 1: not a tokenizer"),
            (b"IQ== 0\nIg== one\n", r"line 2: not a tokenizer"),
            (b"IQ== 0\nIg== 2\n", r"line 2: rank 2 for b'\"' where 1"),
            (b"IQ== 0\nIQ== 1\n", r"line 2: rank 1 for b'!'"),
            (b"IQ== 0\nIg== 1\n", r"254 of the 256 single bytes are no tokens \(the first: 0x00\)"),
            (b"", r"256 of the 256 single bytes"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", r"line 1: not a tokenizer"),
        ],
    )
    def test_a_broken_file(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            build_tokenizer(str(tmp_path))
        assert "octavo download" in str(caught.value)
        assert str(tmp_path / "tokenizer.model") in str(caught.value)


class TestHuggingFaceFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "tokenizer.json").write_bytes(
            (TOKENIZERS["octavo_bpe_2048"] / "tokenizer.json").read_bytes()
        )
        return tmp_path

    def test_file_and_folder_are_the_same(self, folder: Path) -> None:
        for path in (folder, folder / "tokenizer.json"):
            tokenizer = build_tokenizer(str(path))
            assert tokenizer.encode("To be, or not to be") == SHIPPED.encode("To be, or not to be")
            assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)

    @pytest.mark.parametrize(
        ("config", "generation", "expected"),
        [
            ({"bos_token": None, "eos_token": "<|begin_of_text|>"}, {}, (None, 0)),
            (
                {"bos_token": {"content": "<|end_of_text|>"}, "eos_token": {"content": "<|begin_of_text|>"}},
                {},
                (1, 0),
            ),
            ({}, {"bos_token_id": 1, "eos_token_id": [0, 1]}, (1, 0)),
            ({"eos_token": "<|end_of_text|>"}, {"bos_token_id": 0, "eos_token_id": 0}, (0, 1)),
            ({"bos_token": "<|begin_of_text|>", "add_bos_token": False}, {}, (None, 1)),
        ],
    )
    def test_document_tokens_from_the_files_beside(
        self,
        folder: Path,
        config: dict[str, object],
        generation: dict[str, object],
        expected: tuple[int | None, int],
    ) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text(json.dumps(generation))
        tokenizer = build_tokenizer(str(folder))
        assert (tokenizer.bos_id, tokenizer.eos_id) == expected
        if tokenizer.bos_id is None:
            with pytest.raises(ValueError, match="bos=True"):
                tokenizer.encode("x", bos=True)

    def test_an_unknown_document_token(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        with pytest.raises(ConfigError, match="it has no token '</s>'"):
            build_tokenizer(str(folder))

    def test_settings_of_the_file_do_not_change_ids(self, folder: Path) -> None:
        """Truncation, padding, a template that adds special tokens: may be in the file, and never apply."""
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        content["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        content["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<|end_of_text|>",
        }
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [0], "tokens": ["<|begin_of_text|>"]}
            },
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
        text = "Now is the winter of our discontent"
        assert build_tokenizer(str(folder)).encode(text) == SHIPPED.encode(text)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("tokenizer.json", "{}", "not a usable Hugging Face tokenizer.json"),
            ("tokenizer.json", '{"model": {"type": "BPE"', "not a usable Hugging Face tokenizer.json"),
            ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "it has no tokens"),
            ("tokenizer.json", "<html>", "not JSON, so not a Hugging Face tokenizer.json"),
            ("tokenizer_config.json", "{", "not readable as JSON"),
            ("tokenizer_config.json", "[]", "a list, not a JSON object"),
        ],
    )
    def test_a_broken_file(self, folder: Path, name: str, content: str, message: str) -> None:
        (folder / name).write_text(content)
        with pytest.raises(ConfigError, match=message) as caught:
            build_tokenizer(str(folder))
        assert str(folder / name) in str(caught.value)


WORDS = {"a": 0, "##b": 1, "[UNK]": 2, "<|end_of_text|>": 3}
BYTE_LEVEL = {letter: number for number, letter in enumerate("Cafnïveâ€")} | {"<|end_of_text|>": 99}


@pytest.mark.parametrize(
    ("model", "text", "message"),
    [
        ({"type": "BPE", "vocab": BYTE_LEVEL, "merges": []}, "Café", r"25.000% of 4 characters .* '\\xe9'"),
        ({"type": "BPE", "vocab": BYTE_LEVEL, "merges": []}, "Cafe", None),
        ({"type": "BPE", "vocab": WORDS, "merges": []}, "ab", "have no token: 'b'"),
        ({"type": "BPE", "vocab": WORDS, "merges": [], "unk_token": "[NO]"}, "ab", "cannot encode a text"),
        ({"type": "WordPiece", "vocab": WORDS, "unk_token": "[UNK]"}, "ab", None),
        ({"type": "WordPiece", "vocab": WORDS, "unk_token": "[UNK]"}, "ba", "100.000% of 2 characters"),
        ({"type": "WordPiece", "vocab": WORDS, "unk_token": "[NO]"}, "ba", "cannot encode a text"),
        ({"type": "WordLevel", "vocab": WORDS, "unk_token": "[NO]"}, "b", "cannot encode a text"),
        ({"type": "Unigram", "vocab": [["a", -1], ["<|end_of_text|>", -9]]}, "b", "cannot encode a text"),
        ({"type": "BPE", "vocab": WORDS, "merges": [], "x": [[[]] * 3]}, "a", None),
    ],
)
def test_text_that_would_be_lost_is_refused(tmp_path: Path, model: dict, text: str, message: str) -> None:
    content = {"version": "1.0", "added_tokens": [], "model": model, "decoder": None, "normalizer": None}
    if model["vocab"] is BYTE_LEVEL:
        content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if model["type"] == "WordPiece":
        model = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100, **model}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "model": model}))
    tokenizer = build_tokenizer(str(tmp_path))
    if message is None:
        assert tokenizer.encode(text)
    else:
        with pytest.raises(ConfigError, match=message):
            tokenizer.encode(text)


def test_a_small_loss_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = {"type": "BPE", "vocab": WORDS, "merges": []}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    )
    tokenizer = build_tokenizer(str(tmp_path))
    assert len(tokenizer.encode("a" * 999 + "b")) == 999
    tokenizer.encode("a" * 999 + "b")
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "0.100% of 1,000 characters of the text have no token: 'b'. They are lost"
    ]


@pytest.mark.parametrize("content", ["[" * 200_000, '{"model":' * 200_000])
def test_deeply_nested_json(tmp_path: Path, content: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer.json").write_bytes(
            (TOKENIZERS["octavo_bpe_2048"] / "tokenizer.json").read_bytes()
        )
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=name):
            build_tokenizer(str(tmp_path))


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        build_tokenizer(str(tmp_path / "tokenizer.json"))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"assets/hf/Llama-3.1-8B does not exist") as caught:
        build_tokenizer("assets/hf/Llama-3.1-8B")
    assert "octavo download --repo_id meta-llama/Llama-3.1-8B --assets tokenizer" in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'octavo_bpe_2048'"):
        build_tokenizer("octavo_bpe_2024")
    with pytest.raises(
        ConfigError, match=r"no tokenizer\.json, tokenizer\.model or original/tokenizer\.model"
    ):
        build_tokenizer(str(tmp_path))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[train\]'"):
        build_tokenizer("octavo_bpe_2048")
