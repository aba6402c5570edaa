"""The schema itself: every key is documented, of a type that can be read, and has a valid default."""

import ast
import inspect

import pytest

from octavo.config import schema
from octavo.config.schema import SECTIONS, JobConfig
from octavo.config.values import convert, describe

KEYS = [(section, key) for section, keys in SECTIONS.items() for key in keys]


def test_every_key_has_a_help_text_below_it() -> None:
    documented = 0
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef) and node.name != "JobConfig":
            fields = [at for at, statement in enumerate(node.body) if isinstance(statement, ast.AnnAssign)]
            for at in fields:
                below = node.body[at + 1] if at + 1 < len(node.body) else None
                name = ast.unparse(node.body[at])
                assert isinstance(below, ast.Expr), name
                assert isinstance(below.value, ast.Constant), name
                assert below.value.value.strip(), name
            documented += len(fields)
    assert documented == len(KEYS)


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_each_default_is_a_value_that_its_key_takes(section: str, key: str) -> None:
    default, kind = getattr(getattr(JobConfig(), section), key), SECTIONS[section][key]
    assert describe(kind)
    if default is not None:
        assert convert(kind, default, text=False) == default
        shown = ",".join(default) if isinstance(default, list) else str(default)
        assert convert(kind, shown, text=True) == default
