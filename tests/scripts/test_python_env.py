"""run_train.sh and run_tests.sh: the Python they use, what they install, what reaches the program."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.waiting import LIMIT, wait_for
from tests.scripts import checkout as checkouts
from tests.scripts.checkout import Checkout

FITTING = {"torch": "2.13.0"}
TRAIN = ("tokenizers",)


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    made = checkouts.make(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def venv_python(checkout: Checkout) -> str:
    return str(checkout.root / ".venv/bin/python")


def add_gpu(checkout: Checkout, answer: str = "echo 'GPU 0: H100 (UUID: GPU-1)'") -> None:
    (checkout.tools / "nvidia-smi").write_text(f"#!/usr/bin/env bash\n{answer}\n")
    (checkout.tools / "nvidia-smi").chmod(0o755)


def require_another_torch(checkout: Checkout) -> None:
    pyproject = checkout.root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"torch>=2.11"', '"torch>=2.12"'))


# What is installed


def test_first_start_installs_the_cpu_build_of_torch_and_then_octavo_with_torch_held(checkout):
    start = checkout.start()

    assert start.code == 0, start.err
    torch, octavo = checkout.pip_calls
    assert torch.endswith("--no-deps torch==2.13.0+cpu")
    assert octavo.endswith(f"--editable {checkout.root}[train] torch==2.13.0+cpu")
    assert start.report["python"] == venv_python(checkout)
    assert start.report["module"] == "octavo.launch.__main__"

    again = checkout.start(FAKE_INDEX="none")
    assert (again.code, again.err) == (0, "")
    assert checkout.pip_calls == [torch, octavo]


def test_an_index_without_cpu_builds_is_told_before_the_download(checkout):
    start = checkout.start(FAKE_INDEX="cuda")

    assert start.code == 0
    assert [call.split()[-1] for call in checkout.pip_calls] == [
        *("torch==2.13.0+cpu", "torch==2.13.0", "torch==2.13.0")
    ]
    assert "no CPU build of torch 2.13.0" in start.err
    assert "OCTAVO_TORCH_INDEX=URL" in start.err


def test_a_gpu_takes_no_cpu_build_and_one_that_appears_later_exchanges_it(checkout):
    add_gpu(checkout, "echo 'NVIDIA-SMI has failed'; exit 9")  # no driver
    checkout.start()
    assert checkout.pip_calls[0].endswith("torch==2.13.0+cpu")
    add_gpu(checkout)
    checkout.start()
    checkout.start()
    assert [call.split()[-1] for call in checkout.pip_calls[2:]] == ["torch==2.13.0,!=2.13.0+cpu"] * 2


def test_another_index_is_used_for_torch_alone(checkout):
    checkout.start(OCTAVO_TORCH_INDEX="https://index.invalid/cpu")

    torch, octavo = checkout.pip_calls
    assert "--index-url https://index.invalid/cpu" in torch
    assert "index.invalid" not in octavo


def test_an_index_out_of_reach_is_asked_once_and_the_error_names_the_remedies(checkout):
    start = checkout.start(FAKE_INDEX="none")

    assert start.code == 1
    assert len(checkout.pip_calls) == 1
    assert "from versions: none" in start.err
    assert "OCTAVO_TORCH_INDEX" in start.err
    assert start.out == ""


def test_uv_makes_and_fills_the_environment_where_it_is_there(checkout):
    uv = checkout.tools / "uv"
    uv.write_text(
        '#!/usr/bin/env bash\necho "$*" >>"$FAKE_PIP_LOG"\n'
        f'if [[ $1 == venv ]]; then exec "{checkout.tools}/python3.13" -m venv "${{!#}}"; fi\n'
    )
    uv.chmod(0o755)
    start = checkout.start()

    assert start.code == 0, start.err
    venv, torch, octavo = checkout.pip_calls
    assert venv.startswith("venv ")
    assert torch == f"pip install --python {venv_python(checkout)} -q --no-deps torch==2.13.0+cpu"
    assert octavo.endswith(f"--editable {checkout.root}[train] torch==2.13.0+cpu")


def test_no_python_is_one_message(checkout):
    (checkout.tools / "python3.13").write_text(
        "#!/usr/bin/env bash\nexit 127\n"
    )  # a shim with nothing behind it
    start = checkout.start()

    assert start.code == 2
    assert "no Python >= 3.11 with venv" in start.err
    assert "apt install python3 python3-venv" in start.err
    assert not (checkout.root / ".venv").exists()


def test_help_installs_nothing(checkout):
    start = checkout.start("run_train.sh", "--help")

    assert start.code == 0
    assert start.report["argv"] == ["--help"]
    assert checkout.pip_calls == []
    assert not (checkout.root / ".venv").exists()


# Changes and accidents


def test_requirements_that_changed_are_installed_and_other_settings_are_not(checkout):
    checkout.start()
    pyproject = checkout.root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("line-length = 110", "line-length = 100"))
    checkout.start()
    assert len(checkout.pip_calls) == 2

    require_another_torch(checkout)
    assert checkout.start(FAKE_INDEX="broken").code == 1
    calls = len(checkout.pip_calls)
    assert checkout.start().code == 0
    assert len(checkout.pip_calls) == calls + 2


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_installation_is_thrown_away_and_made_again(checkout, kill):
    process = checkout.begin(FAKE_INDEX="hang")
    hangs = Path(checkout.environ["FAKE_PIP_LOG"] + ".hangs")
    wait_for("pip to hang", hangs.exists)
    os.killpg(process.pid, kill)
    process.communicate()
    half = checkout.root / ".venv/half-unpacked"
    half.write_text("")

    start = checkout.start()
    assert start.code == 0, start.err
    assert not half.exists()
    assert start.report["python"] == venv_python(checkout)


def test_an_environment_that_octavo_did_not_make_is_left_alone(checkout):
    theirs = checkout.root / ".venv/precious"
    theirs.parent.mkdir()
    theirs.write_text("")
    start = checkout.start()

    assert start.code == 2
    assert "did not make it" in start.err
    assert theirs.exists()
    assert checkout.pip_calls == []


def test_two_starts_at_once_install_once(checkout):
    first = checkout.begin()
    second = checkout.begin()
    results = [(*process.communicate(timeout=LIMIT), process.returncode) for process in (first, second)]

    assert [code for _, _, code in results] == [0, 0], results
    assert len(checkout.pip_calls) == 2


# The user's own environments


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_that_fits_is_used_as_it_is(checkout, variable):
    active = checkout.environment("active env", FITTING, TRAIN)
    start = checkout.start(FAKE_INDEX="none", **{variable: str(active)})

    assert start.code == 0, start.err
    assert start.report["python"] == str(active / "bin/python")
    assert start.err == ""
    assert checkout.pip_calls == []
    assert not (checkout.root / ".venv").exists()


def test_octavo_python_comes_first_then_a_virtual_environment_then_conda(checkout):
    chosen = checkout.environment("chosen", FITTING, TRAIN)
    venv = checkout.environment("venv", FITTING, TRAIN)
    conda = checkout.environment("conda", FITTING, TRAIN)
    start = checkout.start(VIRTUAL_ENV=str(venv), CONDA_PREFIX=str(conda))
    assert start.report["python"] == str(venv / "bin/python")
    (checkout.tools / "my-python").symlink_to(chosen / "bin/python")
    start = checkout.start(OCTAVO_PYTHON="my-python", VIRTUAL_ENV=str(venv))

    assert start.code == 0, start.err
    assert start.report["python"] == str(checkout.tools / "my-python")


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git123", "2.13.0+cu130", "3.0.1"])
def test_versions_of_torch_that_fit(checkout, version):
    active = checkout.environment("active", {"torch": version}, TRAIN)
    start = checkout.start(VIRTUAL_ENV=str(active))

    assert start.report["python"] == str(active / "bin/python")


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cu128", "1.13.1"])
def test_an_old_torch_is_told_and_not_used(checkout, version):
    active = checkout.environment("active", {"torch": version}, TRAIN)
    start = checkout.start(VIRTUAL_ENV=str(active))

    assert start.code == 0
    assert f"torch {version}; octavo needs torch >= 2.11" in start.err
    assert start.report["python"] == venv_python(checkout)


@pytest.mark.parametrize(
    ("packages", "complaint"),
    [({"torch": "2.10.0"}, "torch 2.10.0; octavo needs torch >= 2.11"), ({}, "has no torch")],
)
def test_octavo_python_that_does_not_fit_is_an_error(checkout, packages, complaint):
    chosen = checkout.environment("chosen", packages, TRAIN)
    start = checkout.start(OCTAVO_PYTHON=str(chosen / "bin/python"))

    assert start.code == 2
    assert complaint in start.err
    assert checkout.pip_calls == []


def test_octavo_python_that_does_not_exist_or_start_is_an_error(checkout):
    start = checkout.start(OCTAVO_PYTHON="no-such-python")
    assert (start.code, "OCTAVO_PYTHON=no-such-python: no such program" in start.err) == (2, True)
    start = checkout.start(OCTAVO_PYTHON="ls")
    assert (start.code, "OCTAVO_PYTHON=" in start.err) == (2, True)


def test_a_missing_package_in_a_fitting_environment_is_an_error_with_the_command(checkout):
    active = checkout.environment("active", FITTING, [])
    (checkout.root.parent / "work").mkdir()
    (checkout.root.parent / "work/tokenizers.py").write_text("")  # no installed package
    start = checkout.start(cwd=checkout.root.parent / "work", VIRTUAL_ENV=str(active))

    assert start.code == 2
    assert "but not: tokenizers." in start.err
    assert f"'{active}/bin/python' -m pip install -e '{checkout.root}[train]'" in start.err
    assert checkout.pip_calls == []


def test_an_active_environment_without_torch_leaves_the_choice_to_us(checkout):
    start = checkout.start(VIRTUAL_ENV=str(checkout.environment("active", {}, TRAIN)))

    assert start.report["python"] == venv_python(checkout)


def test_our_own_environment_when_active_is_still_kept_up_to_date(checkout):
    checkout.start()
    checkout.start("run_tests.sh", VIRTUAL_ENV=str(checkout.root / ".venv"))

    assert "[train,test]" in checkout.pip_calls[-1]


# What reaches the program


ARGUMENTS = ("--a", "two words", "", "quo'te\"s", "new\nline", "*", "$HOME", "--b=x y", "\\", "é")


@pytest.mark.parametrize("way", ["directly", "by a link", "by a relative link"])
def test_arguments_and_working_directory_arrive_unbroken(checkout, tmp_path, way):
    active = checkout.environment("active", FITTING, TRAIN)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    script = checkout.root / "run_train.sh"
    if way != "directly":
        target = script if way == "by a link" else Path(os.path.relpath(script, elsewhere))
        script = elsewhere / "train it"
        script.symlink_to(target)
    start = checkout.start(script, *ARGUMENTS, cwd=elsewhere, VIRTUAL_ENV=str(active), PYTHONPATH="/mine")

    assert start.code == 0, start.err
    assert tuple(start.report["argv"]) == ARGUMENTS
    assert start.report["cwd"] == str(elsewhere)
    assert start.report["path"][-2:] == [str(checkout.root), "/mine"]


def test_a_package_of_the_working_directory_does_not_shadow_octavo(checkout, tmp_path):
    active = checkout.environment("active", FITTING, TRAIN)
    (tmp_path / "work/octavo").mkdir(parents=True)
    (tmp_path / "work/octavo/__init__.py").write_text("raise SystemExit('shadowed')")
    start = checkout.start(cwd=tmp_path / "work", VIRTUAL_ENV=str(active))

    assert start.code == 0, start.err


def test_the_exit_code_and_the_process_are_the_programs_own(checkout):
    active = checkout.environment("active", FITTING, TRAIN)
    process = checkout.begin(VIRTUAL_ENV=str(active), FAKE_EXIT="7")
    out, err = process.communicate(timeout=LIMIT)

    assert process.returncode == 7
    assert f'"pid": {process.pid},' in out, err  # no shell in between: signals reach it


# run_tests.sh


def test_run_tests_adds_the_test_extra_and_training_keeps_it(checkout):
    checkout.start()
    tests = checkout.start("run_tests.sh", "-k", "two words")
    assert "[train,test]" in checkout.pip_calls[-1]
    assert tests.report["module"] == "pytest.__main__"
    assert tests.report["argv"][-2:] == ["-k", "two words"]
    assert tests.report["threads"] == "1"

    calls = len(checkout.pip_calls)
    checkout.start()
    assert len(checkout.pip_calls) == calls
    require_another_torch(checkout)
    checkout.start()
    assert "[train,test]" in checkout.pip_calls[-1]


def test_run_tests_in_an_environment_without_test_packages_is_an_error(checkout):
    active = checkout.environment("active", FITTING, TRAIN)
    start = checkout.start("run_tests.sh", VIRTUAL_ENV=str(active))

    assert start.code == 2
    assert "pytest" in start.err
    assert "[train,test]" in start.err


def test_run_tests_leaves_the_slow_ones_out_unless_all_are_asked_for(checkout):
    assert "-m" not in checkout.start("run_tests.sh").report["argv"]
    asked = checkout.start("run_tests.sh", "--all", "tests/data").report["argv"]
    assert asked[-3:] == ["-m", "slow or not slow", "tests/data"]


def test_run_tests_works_from_any_directory(checkout, tmp_path):
    checkout.start("run_tests.sh")
    start = checkout.start("run_tests.sh", cwd=tmp_path)

    assert start.report["cwd"] == str(checkout.root)
