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


def wait_until_pip_hangs(checkout: Checkout) -> None:
    hangs = Path(checkout.environ["FAKE_PIP_LOG"] + ".hangs")
    wait_for("pip to hang", hangs.exists)


# What is installed


def test_first_start_installs_the_cpu_build_of_torch_and_then_octavo_with_torch_held(checkout):
    start = checkout.start()

    assert start.code == 0, start.err
    torch, octavo = checkout.pip_calls
    assert torch.endswith("--no-deps torch==2.13.0+cpu")
    assert octavo.endswith(f"--editable {checkout.root}[train]")
    constraints = checkout.root / ".venv/.octavo-constraints.txt"
    assert f"--constraint {constraints} " in octavo
    assert constraints.read_text() == "torch==2.13.0+cpu\n"
    assert start.report["python"] == venv_python(checkout)
    assert start.report["module"] == "octavo.launch.__main__"


def test_second_start_installs_nothing_and_says_nothing(checkout):
    checkout.start()
    calls = checkout.pip_calls
    start = checkout.start(FAKE_INDEX="none")

    assert start.code == 0
    assert start.err == ""
    assert checkout.pip_calls == calls


def test_an_index_without_cpu_builds_is_told_before_the_download(checkout):
    start = checkout.start(FAKE_INDEX="cuda")

    assert start.code == 0
    assert [call.split()[-1] for call in checkout.pip_calls[:2]] == ["torch==2.13.0+cpu", "torch==2.13.0"]
    assert "no CPU build of torch 2.13.0" in start.err
    assert "OCTAVO_TORCH_INDEX=URL" in start.err


def test_a_machine_with_a_gpu_takes_no_cpu_build(checkout):
    (checkout.tools / "nvidia-smi").write_text("#!/usr/bin/env bash\necho 'GPU 0: H100 (UUID: GPU-1)'\n")
    (checkout.tools / "nvidia-smi").chmod(0o755)
    start = checkout.start()

    assert start.code == 0
    assert checkout.pip_calls[0].endswith("torch==2.13.0,!=2.13.0+cpu")


def test_a_gpu_that_appears_later_exchanges_the_cpu_build(checkout):
    checkout.start()
    (checkout.tools / "nvidia-smi").write_text("#!/usr/bin/env bash\necho 'GPU 0: H100 (UUID: GPU-1)'\n")
    (checkout.tools / "nvidia-smi").chmod(0o755)
    checkout.start()
    checkout.start()

    assert [call.split()[-1] for call in checkout.pip_calls[2::2]] == ["torch==2.13.0,!=2.13.0+cpu"]


def test_an_nvidia_smi_that_finds_no_driver_is_no_gpu(checkout):
    (checkout.tools / "nvidia-smi").write_text("#!/usr/bin/env bash\necho 'NVIDIA-SMI has failed'; exit 9\n")
    (checkout.tools / "nvidia-smi").chmod(0o755)
    checkout.start()

    assert checkout.pip_calls[0].endswith("torch==2.13.0+cpu")


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


def test_no_python_is_one_message(checkout):
    (checkout.tools / "python3.13").write_text(
        "#!/usr/bin/env bash\nexit 127\n"
    )  # a shim with nothing behind it
    start = checkout.start()

    assert start.code == 2
    assert "no Python >= 3.11" in start.err
    assert "python3.13: does not start" in start.err
    assert not (checkout.root / ".venv").exists()


def test_a_python_without_venv_is_told_as_that(checkout):
    (checkout.tools / "python3.13").write_text("#!/usr/bin/env bash\nexit 10\n")
    start = checkout.start()

    assert start.code == 2
    assert "python3.13: has no venv module (Debian, Ubuntu: apt install python3-venv)" in start.err


def test_a_python_is_started_once_to_be_judged(checkout):
    python, log = checkout.tools / "python3.13", checkout.tools / "log"
    real, first = python.read_text(), "#!/usr/bin/env bash\n"
    assert real.startswith(first)
    python.write_text(real.replace(first, f"{first}echo started >>'{log}'\n", 1))
    start = checkout.start("run_train.sh", "--help")

    assert start.code == 0
    assert log.read_text() == "started\n" * 2  # to be judged, then to print the help


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

    pyproject.write_text(pyproject.read_text().replace('"torch>=2.11"', '"torch>=2.12"'))
    start = checkout.start()
    assert len(checkout.pip_calls) == 4
    assert "requirements have changed" in start.err


def test_a_killed_installation_is_thrown_away_and_made_again(checkout):
    process = checkout.begin(FAKE_INDEX="hang")
    wait_until_pip_hangs(checkout)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    half = checkout.root / ".venv/half-unpacked"
    half.write_text("")

    start = checkout.start()
    assert start.code == 0, start.err
    assert "not finished" in start.err
    assert not half.exists()
    assert start.report["python"] == venv_python(checkout)


def test_a_kill_between_making_the_folder_and_marking_it_is_repaired(checkout):
    (checkout.root / ".venv").mkdir()
    assert checkout.start().code == 0


def test_a_failed_update_keeps_the_environment_and_is_tried_again(checkout):
    checkout.start()
    kept = checkout.root / ".venv/kept"
    kept.write_text("")
    pyproject = checkout.root / "pyproject.toml"
    old = pyproject.read_text()
    pyproject.write_text(old.replace('"torch>=2.11"', '"torch>=2.12"'))

    assert checkout.start(FAKE_INDEX="broken").code == 1
    calls = len(checkout.pip_calls)
    assert checkout.start().code == 0
    assert len(checkout.pip_calls) > calls
    assert kept.exists()


def test_an_environment_that_octavo_did_not_make_is_left_alone(checkout):
    theirs = checkout.root / ".venv/precious"
    theirs.parent.mkdir()
    theirs.write_text("")
    start = checkout.start()

    assert start.code == 2
    assert "did not make it" in start.err
    assert theirs.exists()
    assert checkout.pip_calls == []


@pytest.mark.parametrize("lock", ["flock", "link"])
def test_two_starts_at_once_install_once(checkout, lock):
    if lock == "link":
        (checkout.tools / "flock").unlink()
    first = checkout.begin()
    second = checkout.begin()
    results = [(*process.communicate(timeout=LIMIT), process.returncode) for process in (first, second)]

    assert [code for _, _, code in results] == [0, 0], results
    assert len(checkout.pip_calls) == 2


def test_the_lock_of_a_dead_process_is_taken_over(checkout):
    (checkout.tools / "flock").unlink()
    process = checkout.begin(FAKE_INDEX="hang")
    wait_until_pip_hangs(checkout)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (checkout.root / ".venv.lock.owner").is_symlink()

    assert checkout.start().code == 0
    assert not (checkout.root / ".venv.lock.owner").is_symlink()


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


def test_octavo_python_comes_first_and_may_be_a_name_on_path(checkout):
    chosen = checkout.environment("chosen", FITTING, TRAIN)
    active = checkout.environment("active", FITTING, TRAIN)
    (checkout.tools / "my-python").symlink_to(chosen / "bin/python")
    start = checkout.start(OCTAVO_PYTHON="my-python", VIRTUAL_ENV=str(active))

    assert start.code == 0, start.err
    assert start.report["python"] == str(checkout.tools / "my-python")


def test_a_virtual_environment_comes_before_conda(checkout):
    venv = checkout.environment("venv", FITTING, TRAIN)
    conda = checkout.environment("conda", FITTING, TRAIN)
    start = checkout.start(VIRTUAL_ENV=str(venv), CONDA_PREFIX=str(conda))

    assert start.report["python"] == str(venv / "bin/python")


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


def test_octavo_python_that_does_not_exist_is_an_error(checkout):
    start = checkout.start(OCTAVO_PYTHON="no-such-python")

    assert start.code == 2
    assert "OCTAVO_PYTHON=no-such-python: no such program" in start.err


def test_a_missing_package_in_a_fitting_environment_is_an_error_with_the_command(checkout):
    active = checkout.environment("active", FITTING, [])
    start = checkout.start(VIRTUAL_ENV=str(active))

    assert start.code == 2
    assert "but not: tokenizers." in start.err
    assert f"'{active}/bin/python' -m pip install -e '{checkout.root}[train]'" in start.err
    assert checkout.pip_calls == []


def test_a_module_of_the_working_directory_is_no_installed_package(checkout, tmp_path):
    active = checkout.environment("active", FITTING, [])
    (tmp_path / "work").mkdir()
    (tmp_path / "work/tokenizers.py").write_text("")
    start = checkout.start(cwd=tmp_path / "work", VIRTUAL_ENV=str(active))

    assert start.code == 2


def test_an_active_environment_without_torch_leaves_the_choice_to_us(checkout):
    start = checkout.start(VIRTUAL_ENV=str(checkout.environment("active", {}, TRAIN)))

    assert start.report["python"] == venv_python(checkout)


def test_our_own_environment_when_active_is_still_kept_up_to_date(checkout):
    checkout.start()
    checkout.start("run_tests.sh", VIRTUAL_ENV=str(checkout.root / ".venv"))

    assert checkout.pip_calls[-1].endswith("[train,test]")


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
    assert checkout.pip_calls[-1].endswith("[train,test]")
    assert tests.report["module"] == "pytest.__main__"
    assert tests.report["argv"][-2:] == ["-k", "two words"]
    assert tests.report["threads"] == "1"

    calls = len(checkout.pip_calls)
    checkout.start()
    assert len(checkout.pip_calls) == calls
    pyproject = checkout.root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"torch>=2.11"', '"torch>=2.12"'))
    checkout.start()
    assert checkout.pip_calls[-1].endswith("[train,test]")


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
