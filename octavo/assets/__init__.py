"""Text and tokenizer that ship in the package, so that a first run needs no network.

Paths only: what is in them is read by `octavo.data` and `octavo.tokenizer`. Importing
this costs nothing, no torch and no numpy, for the preflight check reads it too. Sources and licences:
`README.md` beside this file.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

_HERE = Path(__file__).resolve().parent

CORPORA: Mapping[str, Path] = MappingProxyType({"shakespeare": _HERE / "shakespeare"})
"""Name of a shipped corpus -> its folder of `.txt` files, one document each."""

TOKENIZERS: Mapping[str, Path] = MappingProxyType({"octavo_bpe_2048": _HERE / "octavo_bpe_2048"})
"""Name of a shipped tokenizer -> its folder, which holds `tokenizer.json` and `tokenizer_config.json`."""
