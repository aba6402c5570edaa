"""A user's module registers a model, or is refused with the option that named it."""

import sys

import pytest

from octavo import models
from octavo.config import ConfigError
from tests.models.own import MODULE, own_model


def test_a_module_of_the_working_directory_registers_its_model(tmp_path, monkeypatch):
    own_model(tmp_path, monkeypatch)
    models.import_custom("small_llamas", "small_llama")
    models.import_custom("small_llamas", "small_llama")  # importing twice is fine
    assert models.get("small_llama").name == "small_llama"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("x = 1", ["model.name = 'other'", "experimental.custom_import = small_llamas", "known: llama3"]),
        ("import sys; sys.exit(0)", ["experimental.custom_import = small_llamas", "sys.exit"]),
    ],
    ids=["registers nothing", "calls sys.exit"],
)
def test_a_module_without_the_model_is_refused(content, parts, tmp_path, monkeypatch):
    own_model(tmp_path, monkeypatch)
    (tmp_path / "small_llamas.py").write_text(content)
    with pytest.raises(ConfigError) as error:
        models.import_custom("small_llamas", "other")
    assert all(part in str(error.value) for part in parts)


def test_an_error_in_the_module_names_the_option(tmp_path, monkeypatch):
    own_model(tmp_path, monkeypatch)
    (tmp_path / "small_llamas.py").write_text("import not_there_at_all")
    with pytest.raises(ModuleNotFoundError) as error:
        models.import_custom("small_llamas", "other")
    assert error.value.__notes__ == ["octavo: raised by experimental.custom_import = small_llamas"]
    assert "small_llamas" not in sys.modules


def test_the_working_directory_is_on_the_path_while_a_module_is_imported_and_shadows_nothing(
    tmp_path, monkeypatch
):
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "beside.py").write_text("x = 1")
    own_model(tmp_path, monkeypatch)
    (tmp_path / "small_llamas.py").write_text(MODULE + "import beside, json, sys; sys.path.append('mine')\n")
    monkeypatch.delitem(sys.modules, "json", raising=False)
    before = list(sys.path)
    models.import_custom("small_llamas", "small_llama")
    assert sys.path == [*before, "mine"]
