"""Names from files reach a terminal without their control characters, whoever prints them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo import cli
from octavo.commands.compare import main as compare
from octavo.commands.doctor import main as doctor
from octavo.commands.doctor.findings import fail
from octavo.config import ConfigError
from octavo.core.logging import init_logger, logger
from octavo.core.terminal import for_terminal
from octavo.hf.safetensors_folder import find_tensors
from octavo.launch import launcher
from octavo.metrics import trace_summary
from octavo.train.exit import exit_code_of
from tests.commands.compare.report.writing import falling, write_run

HOSTILE = "\x1b[2J\x9b31m\x07\r\u202e"
SHOWN = r"\x1b[2J\x9b31m\x07\r\u202e"


def test_what_is_escaped() -> None:
    assert for_terminal(f"a{HOSTILE}b") == f"a{SHOWN}b"
    assert for_terminal("Café 東京\n\tx") == "Café 東京\n\tx"
    assert for_terminal("\udcff") == r"\udcff"  # of a file's name that is not UTF-8
    assert for_terminal(SHOWN) == SHOWN


def test_errors_and_logs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(ConfigError(f"tensor {HOSTILE}")) == f"tensor {SHOWN}"
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    init_logger()
    logger.info("field %s", HOSTILE)
    logger.info("\x1b[31mstep", extra={"own_colors": True})
    err = capsys.readouterr().err
    assert f"field {SHOWN}" in err
    assert "\x1b[31mstep" in err


@pytest.mark.parametrize("begin", [lambda: exit_code_of(lambda *_: None), lambda: cli.main(["--version"])])
def test_an_uncaught_exception(
    begin: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    begin()
    sys.excepthook(ValueError, ValueError(HOSTILE), None)
    assert capsys.readouterr().err == f"ValueError: {SHOWN}\n"


def test_a_key_of_a_toml_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.toml"
    path.write_text('[training]\n"st\\u001b[2Jeps" = 3\n')
    assert launcher.main([f"--job.config_file={path}"]) == 2
    err = capsys.readouterr().err
    assert r"\x1b[2J" in err
    assert "\x1b" not in err


def test_a_tensor_of_a_safetensors_file(tmp_path: Path) -> None:
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for name in ("a", "b"):
        header = json.dumps({f"w{HOSTILE}": tensor}).encode()
        (tmp_path / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(ConfigError) as caught:
        find_tensors(tmp_path)
    assert r"\x1b[2J" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_findings_of_the_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    doctor._print("Job", lambda: [fail("config", "key \x1b[2J", "remove \x1b[2J")])
    out = capsys.readouterr().out
    assert out.count(r"\x1b[2J") == 2
    assert "\x1b" not in out


def test_a_comparison_of_foreign_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        write_run(tmp_path / "bf16", falling(), settings={f"key{HOSTILE}": 1}),
        write_run(tmp_path / "rowwise", falling(), recipe="rowwise", settings={f"key{HOSTILE}": 2}),
    ]
    assert compare.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert r"\x1b[2J" in told.err
    assert "\x1b" not in told.out + told.err


def test_a_file_that_is_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace_summary.main([str(tmp_path / f"tr{HOSTILE}")]) == 2
    assert "\x1b" not in capsys.readouterr().err
