"""The schema itself: every key is documented, of a type that can be read, and has a valid default."""

import pytest

from octavo.config import option_help
from octavo.config.schema import OPTIONS, SECTIONS, JobConfig
from octavo.config.values import convert, describe
from tests.conftest import ROOT

KEYS = [(section, key) for section, keys in SECTIONS.items() for key in keys]


def test_every_key_has_a_help_text_below_it() -> None:
    assert option_help.texts().keys() == OPTIONS.keys()


def test_the_reference_page_is_what_the_fields_say() -> None:
    remedy = "python -m octavo.config.option_help > docs/options.md"
    assert (ROOT / "docs/options.md").read_text() == option_help.page(), remedy


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_each_default_is_a_value_that_its_key_takes(section: str, key: str) -> None:
    default, kind = getattr(getattr(JobConfig(), section), key), SECTIONS[section][key]
    assert describe(kind)
    if default is not None:
        assert convert(kind, default, text=False) == default
        shown = ",".join(default) if isinstance(default, list) else str(default)
        assert convert(kind, shown, text=True) == default
