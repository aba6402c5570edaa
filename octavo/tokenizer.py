"""Text to token ids and back, with one interface for all tokenizer files.

Three sources, one engine (the Rust `tokenizers` library):

- a tokenizer shipped in the package, by name; - a Hugging Face `tokenizer.json`, or a folder that holds one;
- Llama 3's `tokenizer.model` in tiktoken's format: lines of a base64 token and its rank. The split pattern
and the special tokens are not in the file, but here (`LLAMA3_SPLIT`, `llama3_specials`).

A tiktoken file has no merge list. At each step tiktoken merges the adjacent pair whose *concatenation* has
the lowest rank, while `tokenizers` needs the pairs themselves. So every split of a token into two tokens
becomes a merge, ordered by the rank of the whole: the same merges, without a second engine.

Text is never trusted: a document that contains the characters `<|end_of_text|>` gets the ids of those
characters, not the special token. Only `bos=True` and `eos=True` produce special ids.

A tokenizer may have no token for a part of a text and drop it, or write all of it as one unknown token. Text
that is encoded is therefore probed (`LostText`): a small loss is a warning, a larger one an error.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.assets import TOKENIZERS
from octavo.core.errors import ConfigError, did_you_mean
from octavo.core.fs import read_json_object, read_whole
from octavo.core.logging import logger

if TYPE_CHECKING:
    import tokenizers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with at most one leading space or sign
    r"|\p{N}{1,3}"  # digits in groups of up to three
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation, with the line ends after it
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space
)
"""How Llama 3 splits text before byte pair encoding: no token crosses a split."""

_LLAMA3_SPECIAL_SLOTS = 256
_FETCH_AGAIN = "fetch it again with `octavo download --repo_id … --assets tokenizer`"


def llama3_specials() -> tuple[str, ...]:
    """Names of Llama 3.1's 256 special tokens, in order of id (the first has the id of the first unused rank,
    128000).

    Llama 3.0 has the same file, ids and slots, and calls some of them reserved.
    """
    named = (
        BOS,
        EOS,
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    )
    reserved = range(2, 2 + _LLAMA3_SPECIAL_SLOTS - len(named))
    return named + tuple(f"<|reserved_special_token_{number}|>" for number in reserved)


MOST_LOST = 0.01
"""Share of the characters of a text that may be lost."""
_PROBED_FIRST, _PROBED_LATER = 1 << 16, 1 << 12  # characters: of the first texts; of each later batch


class LostText:
    """Counts the characters that no token stands for, in the first texts and in a part of all later ones."""

    def __init__(self, engine: tokenizers.Tokenizer, source: str) -> None:
        self._engine, self._source = engine, source
        unknown = getattr(engine.model, "unk_token", None)
        self._unknown = (
            getattr(engine.model, "unk_id", None) if unknown is None else engine.token_to_id(unknown)
        )
        self._missing = _missing_bytes(engine)
        self._probed = 0
        self._lost = Counter[str]()

    @property
    def any(self) -> bool:
        return bool(self._lost)

    def probe(self, texts: Sequence[str]) -> None:
        """Probe a part of `texts`; a warning where something is lost for the first time.

        Raises:
            ConfigError: more than `MOST_LOST` of what was probed so far is lost.
        """
        if self._missing is not None and not self._missing:
            return  # all bytes have tokens
        first, before = max(_PROBED_FIRST - self._probed, _PROBED_LATER), self._lost.total()
        for text in texts:
            if first <= 0:
                break
            part = text[:first]
            first -= len(part)
            self._probed += len(part)
            self._lost.update(self._lost_in(part))
        lost = self._lost.total()
        if lost == before or not self._probed:
            return
        shown = ", ".join(ascii(one) for one, _ in self._lost.most_common(5))
        share = f"{lost / self._probed:.3%} of {self._probed:,} characters of the text have no token: {shown}"
        if lost > MOST_LOST * self._probed:
            raise ConfigError(
                f"{self._source}: {share}. They would be lost, and at most {MOST_LOST:.0%} may be: use a "
                "tokenizer whose vocabulary has all bytes, or one made for this text"
            )
        if not before:
            logger.warning("%s: %s. They are lost", self._source, share)

    def _lost_in(self, text: str) -> list[str]:
        if self._missing is not None:
            return [one for one in text if self._missing.intersection(one.encode())]
        encoded = self._engine.encode(text, add_special_tokens=False)
        has_token = bytearray(len(text))
        for id, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if id != self._unknown:
                has_token[start:end] = b"\1" * (end - start)
        return [one for one, found in zip(text, has_token, strict=True) if not found and not one.isspace()]


def _missing_bytes(engine: tokenizers.Tokenizer) -> set[int] | None:
    """The bytes that a byte-level vocabulary has no token for; None of another kind of vocabulary."""
    if "ByteLevel" not in repr(engine.pre_tokenizer) + repr(engine.normalizer):
        return None
    return {byte for byte, letter in enumerate(_byte_letters()) if engine.token_to_id(letter) is None}


class Tokenizer:
    """Encodes and decodes text. `decode(encode(text)) == text` for any text if the vocabulary is byte-level.

    Attributes:
        vocab_size: one more than the largest id; every id lies in [0, vocab_size).
        bos_id: id that opens a document, or None where the tokenizer has none.
        eos_id: id that closes a document.
        bos, eos: the texts of these two tokens.
        source: the file that it was read from, for messages.
        fingerprint: SHA-256 of what the ids mean: every token with its id, and which open and close a
            document. The same for one vocabulary in two file formats.
    """

    def __init__(self, engine: tokenizers.Tokenizer, *, bos: str | None, eos: str, source: str) -> None:
        engine.no_truncation()
        engine.no_padding()
        engine.encode_special_tokens = True  # special tokens spelled out in a text are plain text
        self._engine = engine
        self._lost = LostText(engine, source)
        self.source = source
        vocabulary = engine.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ConfigError(f"{source}: it has no tokens; fetch or copy it again")
        self.vocab_size = 1 + max(vocabulary.values())
        self.bos, self.eos = bos, eos
        self.bos_id = None if bos is None else self._id(bos)
        self.eos_id = self._id(eos)
        meaning = [self.bos_id, self.eos_id, sorted(vocabulary.items())]
        self.fingerprint = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()

    def _id(self, token: str) -> int:
        found: int | None = self._engine.token_to_id(token)
        if found is None:
            raise ConfigError(
                f"{self.source}: it has no token {token!r}; name the tokens that open and close a "
                "document as bos_token and eos_token in a tokenizer_config.json beside it"
            )
        return found

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with the ids that open (`bos`) and close (`eos`) a document if asked for.

        Raises:
            ValueError: `bos` of a tokenizer without one.
        """
        return self.encode_batch([text], bos=bos, eos=eos)[0]

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False, eos: bool = False) -> list[list[int]]:
        """`encode` of each text, on several cores.

        Raises:
            ConfigError: too much of the texts would be lost (see `LostText`).
        """
        with _refusing(f"{self.source}: cannot encode a text", "use another tokenizer"):
            encoded = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
            self._lost.probe(texts)
        return [self._wrap(one.ids, bos=bos, eos=eos) for one in encoded]

    @property
    def rules(self) -> str:
        """SHA-256 of all that decides the ids of a text: beside what `fingerprint` covers, where text is cut,
        what is merged, and the engine's version.
        """
        rules = [_engine_library().__version__, self.bos_id, self.eos_id, self._engine.to_str()]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    @property
    def loses_text(self) -> bool:
        """Whether a text that was encoded so far was not stored completely."""
        return self._lost.any

    def byte_lengths(self) -> list[int] | None:
        """Bytes of text that each id stands for, [vocab_size]; 0 for special tokens.

        None unless the vocabulary is byte-level or has tokens for bytes: the spelling of other tokens does
        not tell their text, since it has marks (`##`), lacks spaces, or stands for unknown text. Where a
        tokenizer normalises text, these are the bytes of the normalised text.
        """
        lengths = [0] * self.vocab_size
        added = self._engine.get_added_tokens_decoder()
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self._engine.to_str())["decoder"])
        vocabulary = self._engine.get_vocab(with_added_tokens=True)
        if not byte_level and "<0x00>" not in vocabulary:
            return None
        for token, id in vocabulary.items():
            if id in added and added[id].special:
                continue
            if byte_level and id not in added:
                lengths[id] = len(token)  # one letter per byte
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                lengths[id] = 1
            else:
                lengths[id] = len(token.replace("\u2581", " ").encode())  # SentencePiece's space
        return lengths

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens appear by name. Bytes that are not UTF-8 become U+FFFD."""
        text: str = self._engine.decode(list(ids), skip_special_tokens=False)
        return text

    def to_json(self) -> str:
        """The content of a Hugging Face `tokenizer.json` of this tokenizer."""
        text: str = self._engine.to_str(pretty=True)
        return text

    def with_template(self, tokenizer_json: str) -> str:
        """This tokenizer's `tokenizer_json`, changed so that transformers begins a text as training does:
        with the token that opens a document if there is one, and with nothing else.
        """
        library = _engine_library()
        engine = library.Tokenizer.from_str(tokenizer_json)
        begin = [] if self.bos_id is None else [self.bos_id]
        if engine.encode("a").ids == begin + engine.encode("a", add_special_tokens=False).ids:
            return tokenizer_json
        if self.bos is None:
            engine.post_processor = library.processors.TemplateProcessing(single="$A", pair="$A $B:1")
        else:
            engine.post_processor = library.processors.TemplateProcessing(
                single=[self.bos, "$A"],
                pair=[self.bos, "$A", f"{self.bos}:1", "$B:1"],
                special_tokens=[(self.bos, self.bos_id)],
            )
        text: str = engine.to_str(pretty=True)
        return text

    def _wrap(self, ids: list[int], *, bos: bool, eos: bool) -> list[int]:
        if bos and self.bos_id is None:
            raise ValueError(
                f"{self.source}: bos=True, but this tokenizer has no token that opens a document"
            )
        return (
            ([self.bos_id] if bos and self.bos_id is not None else []) + ids + ([self.eos_id] if eos else [])
        )


def build_tokenizer(path_or_name: str) -> Tokenizer:
    """The tokenizer called `path_or_name`: a shipped one's name, a folder, a `tokenizer.json` or a
    `tokenizer.model`.

    A folder is searched for `tokenizer.json`, then for `tokenizer.model`, then for
    `original/tokenizer.model`.

    Raises:
        ConfigError: missing, unreadable or of another format; the message names the path and the remedy.
    """
    path = TOKENIZERS.get(path_or_name) or Path(path_or_name).expanduser()
    if not path.exists():
        raise ConfigError(
            f"tokenizer {path_or_name!r}: {path} does not exist{did_you_mean(path_or_name, TOKENIZERS)}.\n"
            "  Llama 3's:   octavo download --repo_id meta-llama/Llama-3.1-8B --assets tokenizer\n"
            f"  shipped:     {', '.join(TOKENIZERS)}"
        )
    if path.is_dir():
        candidates = [
            path / "tokenizer.json",
            path / "tokenizer.model",
            path / "original" / "tokenizer.model",
        ]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise ConfigError(
                f"{path}: no tokenizer.json, tokenizer.model or original/tokenizer.model in this folder; "
                "fetch one with `octavo download --repo_id … --assets tokenizer`"
            )
        path = found
    try:
        content = read_whole(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    if content.lstrip()[:1] == b"{":
        return _from_json(path, content)
    if path.suffix == ".json":
        raise ConfigError(f"{path}: not JSON, so not a Hugging Face tokenizer.json; fetch or copy it again")
    return _from_tiktoken(path, content)


@contextmanager
def _refusing(problem: str, remedy: str) -> Iterator[None]:
    """Whatever the library raises on a file that it did not expect is one `ConfigError`. Its panics are no
    `Exception`.
    """
    try:
        yield
    except (ConfigError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ConfigError(f"{problem} ({str(error)[:200]!a}); {remedy}") from None


def _engine_library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "a tokenizer needs the package `tokenizers`: pip install 'octavo[train]'"
        ) from error
    return tokenizers


def _from_json(path: Path, content: bytes) -> Tokenizer:
    library = _engine_library()
    with _refusing(f"{path}: not a usable Hugging Face tokenizer.json", "fetch or copy it again"):
        engine = library.Tokenizer.from_buffer(content)
    config = _sibling(path, "tokenizer_config.json")
    bos, eos = _token_name(config.get("bos_token")), _token_name(config.get("eos_token"))
    if eos is None:
        eos = _name_by_id(engine, _sibling(path, "generation_config.json").get("eos_token_id")) or EOS
    if config.get("add_bos_token") is False:
        bos = None
    elif bos is None and "bos_token" not in config:  # an explicit null says that there is none
        by_id = _name_by_id(engine, _sibling(path, "generation_config.json").get("bos_token_id"))
        bos = by_id or (BOS if engine.token_to_id(BOS) is not None else None)
    return Tokenizer(engine, bos=bos, eos=eos, source=str(path))


def _sibling(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` beside `path`; empty where there is no such file."""
    beside = path.with_name(name)
    try:
        return read_json_object(beside)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{beside}: not readable as JSON ({error}); fetch it again, or delete it"
        ) from error


def _token_name(value: object) -> str | None:
    """`tokenizer_config.json` writes a token as its text or as an object around it."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _name_by_id(engine: tokenizers.Tokenizer, value: object) -> str | None:
    """`generation_config.json` writes one id or a list whose first is the document's."""
    first = value[0] if isinstance(value, list) and value else value
    name: str | None = engine.id_to_token(first) if isinstance(first, int) else None
    return name


def _from_tiktoken(path: Path, content: bytes) -> Tokenizer:
    ranks = _parse_tiktoken(path, content)
    library = _engine_library()
    letters = _byte_letters()
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [
        ("".join(letters[byte] for byte in token[:cut]), "".join(letters[byte] for byte in token[cut:]))
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    # ignore_merges: like tiktoken, a piece that is itself a token is that token, whatever the merges would
    # give
    engine = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    engine.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Split(library.Regex(LLAMA3_SPLIT), behavior="isolated"),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = library.decoders.ByteLevel()
    engine.add_special_tokens(list(llama3_specials()))
    return Tokenizer(engine, bos=BOS, eos=EOS, source=str(path))


def _parse_tiktoken(path: Path, content: bytes) -> dict[bytes, int]:
    """Token -> rank. Raises ConfigError if ranks have gaps or a byte has no token: some text would have no
    ids.
    """
    ranks: dict[bytes, int] = {}
    remedy = f"expected tiktoken lines `BASE64 RANK`; {_FETCH_AGAIN}"
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token_text, rank_text = line.split()
            token, rank = base64.b64decode(token_text, validate=True), int(rank_text)
        except (ValueError, binascii.Error) as error:
            raise ConfigError(f"{path}, line {number}: not a tokenizer ({line[:40]!r}); {remedy}") from error
        if token in ranks or rank != len(ranks):
            raise ConfigError(
                f"{path}, line {number}: rank {rank} for {token!r} where {len(ranks)} and a new token must "
                f"follow; {remedy}"
            )
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} of the 256 single bytes are no tokens (the first: {missing[0]:#04x}), "
            f"so the file is cut short or of another kind; {remedy}"
        )
    return ranks


def _byte_letters() -> list[str]:
    """The printable letter that byte-level vocabularies write for each of the 256 bytes.

    Bytes that print in Latin-1 stand for themselves; the others take, in order, the code points from 256 on.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
