"""A token that strayed into a setting, a message or an error is in no log, no dump and no checkpoint."""

import io
import logging
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.cli import main
from octavo.config import ConfigError, JobConfig
from octavo.core.logging import init_logger, logger
from octavo.core.secrets import VARIABLES, redact
from tests.helpers import launching

TOKEN = "of-another-shape.0123456789"
HUB_TOKEN = "hf_" + "aB3dE5fG7h" * 3


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN


def test_tokens_are_cut_out_wherever_they_stand(token):
    value = {"a": [f"x{token}y", 3, None], f"{token}": {"b": (HUB_TOKEN, 1.5)}}
    assert redact(value) == {"a": ["x***y", 3, None], "***": {"b": ("***", 1.5)}}


@pytest.mark.parametrize("variable", VARIABLES)
def test_every_variable_counts(monkeypatch, variable):
    monkeypatch.setenv(variable, f" {TOKEN}\n")
    assert redact(f"a {TOKEN} b") == "a *** b"


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner)))
def test_what_holds_no_token_stays(value):
    assert redact(value) == value


@pytest.mark.parametrize("short", ["", "a", "1234567"])
def test_what_is_too_short_for_a_token_is_not_cut_out(monkeypatch, short):
    monkeypatch.setenv("HF_TOKEN", short)
    assert redact("an average 1234567 text, hf_assets_path") == "an average 1234567 text, hf_assets_path"


def test_errors_and_configurations_tell_none(token):
    assert str(ConfigError(f"no such repository: https://user:{token}@hub")).endswith("https://user:***@hub")
    job = JobConfig()
    job.job.description = f"with {token} and {HUB_TOKEN}"
    assert job.to_dict()["job"]["description"] == "with *** and ***"


def test_the_log_tells_none_in_tracebacks_neither(token, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    kept = logger.handlers[:]
    try:
        init_logger()
        try:
            raise OSError(f"GET https://hub?key={token}")
        except OSError:
            logger.exception("with %s", HUB_TOKEN)
    finally:
        logger.handlers[:] = kept
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    assert "Traceback" in stream.getvalue()
    assert token not in stream.getvalue()
    assert HUB_TOKEN not in stream.getvalue()


def test_a_command_tells_none(token, capsys):
    assert main(["train", f"--training.dataset=/nowhere/{token}"]) == 2
    assert main(["generate", "--prompt=a", f"--checkpoint=/nowhere/{token}"]) == 2
    err = capsys.readouterr().err
    assert "/nowhere/***" in err
    assert token not in err


def test_a_run_leaves_none_behind(token, tmp_path):
    flags = {"job.description": f"it is {token}", "job.print_config": True, "checkpoint.enable": True}
    run = launching.train(tmp_path, {**flags, "training.steps": 2})
    assert run.exit_codes == [0], run.log
    assert "it is ***" in run.log
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".distcp" for path in files)
    for path in files:
        assert token.encode() not in path.read_bytes(), path


def test_a_traceback_that_nobody_catches_has_no_token():
    code = (
        "from octavo.train.exit import exit_code_of\n"
        "def train(signals, watchdog): raise RuntimeError('sent ' + __import__('os').environ['HF_TOKEN'])\n"
        "exit_code_of(train)"
    )
    token = "hf_" + "a" * 30
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "RuntimeError: sent ***" in done.stderr
    assert token not in done.stderr
