"""The check before anything is started, and what is started then."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.config import ConfigError
from octavo.config.config_file import TRAIN_CONFIGS
from octavo.launch import elastic, launcher
from octavo.launch.launcher import plan, visible_gpus
from tests.helpers.waiting import LIMIT


def planned(
    *argv: str, gpus: int = 0, cores: int = 8, terminal: bool = False, **environ: str
) -> launcher.Launch:
    return plan(argv, environ, gpus=gpus, cores=cores, terminal=terminal)


def option(started: launcher.Launch, name: str) -> str | None:
    """The value of an option of torchrun's own."""
    own = elastic._arguments(started, Path("logs"))[: -len(started.command)]
    found = [argument.removeprefix(f"--{name}=") for argument in own if argument.startswith(f"--{name}=")]
    return found[0] if found else None


# What is started


def test_without_variables_one_process_trains_the_demo():
    started = planned()

    assert started.command == ("-m", "octavo.train", f"--job.config_file={TRAIN_CONFIGS / 'demo.toml'}")
    assert (started.local, started.processes, started.rendezvous) == (1, 1, None)
    assert started.shown_ranks == {0}


def test_options_are_passed_on_in_order_after_the_file():
    options = ["--training.steps", "7", "--job.dump_folder=with a space", "--job.description", ""]

    assert list(planned(*options).command[-len(options) :]) == options


@pytest.mark.parametrize(("gpus", "ngpu", "processes"), [(0, "", 1), (0, "3", 3), (4, "", 4), (4, "2", 2)])
def test_number_of_processes(gpus, ngpu, processes):
    assert planned(gpus=gpus, NGPU=ngpu).local == processes


def test_shown_ranks():
    assert planned(NGPU="4", LOG_RANK="3, 0").shown_ranks == {0, 3}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NGPU": "0"}, "NGPU=0: expected a whole number from 1 up"),
        ({"NGPU": "abc"}, "NGPU=abc: expected"),
        ({"NGPU": "-1"}, "NGPU=-1: expected"),
        ({"NGPU": "1.5"}, "NGPU=1.5: expected"),
        ({"NGPU": "²"}, "NGPU=²: expected"),
        ({"LOG_RANK": "1"}, "LOG_RANK=1: .* with 1 process on this machine: 0$"),
        ({"NGPU": "2", "LOG_RANK": "0,2"}, "LOG_RANK=0,2: .* with 2 processes on this machine: 0 to 1$"),
        ({"LOG_RANK": "all"}, "LOG_RANK=all: expected local ranks"),
        ({"NNODES": "0"}, "NNODES=0: expected"),
        ({"NNODES": "1:2"}, "NNODES=1:2: expected"),
        ({"NNODES": "2"}, "RDZV_ENDPOINT=: NNODES=2 needs host:port"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0"}, "RDZV_ENDPOINT=node0: NNODES=2 needs host:port"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "h:1", "NODE_RANK": "2"}, "NODE_RANK=2: expected 0 to 1"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "x:99999999"}, "=x:99999999: the port must be between 1 and 65535"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "x:65536"}, "the port must be between 1 and 65535"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "x:0"}, "the port must be between 1 and 65535"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 is .* NNODES is not set: set NNODES .* or unset NODE_RANK"),
        ({"RDZV_ENDPOINT": "h:1"}, "RDZV_ENDPOINT=h:1 is .* or unset RDZV_ENDPOINT"),
        (
            {"NNODES": "1", "RDZV_ID": "mine"},
            "RDZV_ID=mine is .* NNODES is 1: set NNODES .* or unset RDZV_ID",
        ),
        ({"NGPU": "9" * 5000}, "expected a whole number from 1 up"),
        ({"LOG_RANK": "9" * 5000}, "expected local ranks"),
        ({"CONFIG_FILE": "~nobody-of-this-name/x"}, "^CONFIG_FILE=~nobody-of-this-name/x: there is no home"),
        ({"CONFIG_FILE": "a" * 300}, "^CONFIG_FILE=a{300}: cannot be read: File name too long$"),
        ({"CONFIG_FILE": "/"}, r"^CONFIG_FILE=/: is a folder; name the \.toml file in it$"),
        ({"CONFIG_FILE": "nothing.toml"}, "CONFIG_FILE=nothing.toml: no such file .* ships: .*demo.toml"),
    ],
)
def test_a_variable_that_cannot_work_is_one_message(environ, message):
    with pytest.raises(ConfigError, match=message):
        planned(**environ)


def test_more_processes_than_gpus_is_an_error():
    with pytest.raises(ConfigError, match="NGPU=3: this machine has 2 visible GPUs; set NGPU to 2 or less"):
        planned(gpus=2, NGPU="3")


def test_several_machines():
    environ = {"NNODES": "4", "NGPU": "2", "RDZV_ENDPOINT": "node0:29500", "LOG_RANK": "1,0"}
    started = planned(**environ)
    assert (started.local, started.processes) == (2, 8)
    assert option(started, "nproc-per-node") == "2"
    assert option(started, "local-ranks-filter") == "0,1"
    assert option(started, "nnodes") == "4"
    assert option(started, "rdzv-endpoint") == "node0:29500"
    assert option(started, "rdzv-backend") == "c10d"
    assert option(started, "rdzv-id") == "octavo"
    assert option(started, "local-addr") is None

    ordered = planned(**environ, NODE_RANK="3", RDZV_ID="mine")
    assert option(ordered, "rdzv-backend") == "static"
    assert option(ordered, "node-rank") == "3"
    assert option(ordered, "rdzv-id") == "mine"


def test_the_job_is_checked_for_the_processes_of_all_machines():
    environ = {"NNODES": "2", "NGPU": "2", "RDZV_ENDPOINT": "node0:29500"}
    planned("--training.global_batch_size=32", **environ)
    with pytest.raises(ConfigError, match=r"global_batch_size.*24"):
        planned("--training.global_batch_size=24", **environ)


# Which file


def test_config_file_is_a_path_or_the_name_of_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = planned(CONFIG_FILE="debug_model.toml")
    assert shipped.command[-1] == f"--job.config_file={TRAIN_CONFIGS / 'debug_model.toml'}"

    (tmp_path / "debug_model.toml").write_text("[training]\nsteps = 3\n")
    own = planned(CONFIG_FILE="debug_model.toml")
    assert own.command[-1] == "--job.config_file=debug_model.toml"


def test_the_option_alone_names_the_file(tmp_path):
    file = tmp_path / "with space.toml"
    file.write_text("")
    started = planned("--job.config_file", str(file))

    assert started.command == ("-m", "octavo.train", "--job.config_file", str(file))


@pytest.mark.parametrize("spelling", ["--job.config_file", "--job.config-file", "--config_file"])
def test_two_different_files_are_a_contradiction_and_one_named_twice_is_not(tmp_path, spelling):
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text("")
    other.write_text("")
    with pytest.raises(ConfigError, match="name two files"):
        planned(spelling, str(one), CONFIG_FILE=str(other))
    planned(spelling, str(one), CONFIG_FILE=str(one))
    planned(spelling, str(TRAIN_CONFIGS / "demo.toml"), CONFIG_FILE="demo.toml")


def test_an_option_that_names_a_shipped_file_is_checked_with_it():
    with pytest.raises(ConfigError, match=r"model.hf_assets_path = \S+ \(\S+/llama3_8b.toml:\d+\): no such"):
        planned("--job.config_file=llama3_8b.toml")


# The environment of the training processes


def test_environment_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = planned(NGPU="2", cores=8, PYTHONPATH="/a:/b").environment

    assert environment["OMP_NUM_THREADS"] == "4"
    assert environment["GOMP_SPINCOUNT"] == "0"
    assert environment["OMP_WAIT_POLICY"] == "passive"
    assert "glibc.malloc.hugetlb=1" in environment["GLIBC_TUNABLES"]
    assert planned(GLIBC_TUNABLES="x").environment["GLIBC_TUNABLES"] == "x"
    assert environment["PYTHONPATH"] == "/a:/b"
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert "PYTORCH_ALLOC_CONF" not in environment
    assert planned(NGPU="3", cores=2).environment["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in planned().environment  # torch takes every core by itself


def test_colours_where_the_launcher_itself_has_a_terminal():
    assert planned(terminal=True).environment["FORCE_COLOR"] == "1"
    assert planned(terminal=True, NO_COLOR="").environment["FORCE_COLOR"] == "1"
    assert "FORCE_COLOR" not in planned().environment
    assert "FORCE_COLOR" not in planned(terminal=True, NO_COLOR="1").environment
    assert "FORCE_COLOR" not in planned(terminal=True, FORCE_COLOR="").environment


def test_main_looks_at_its_own_terminal(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(launcher, "run", lambda planned: started.append(planned) or 0)
    for variable in ("CONFIG_FILE", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert launcher.main([]) == 0

    assert [one.environment.get("FORCE_COLOR") for one in started] == ["1", None]


def test_environment_on_a_gpu():
    environment = planned(gpus=1).environment

    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "GOMP_SPINCOUNT" not in environment
    assert "GLIBC_TUNABLES" not in environment


def test_what_the_user_has_set_stays():
    cpu = planned(NGPU="2", OMP_NUM_THREADS="3", GOMP_SPINCOUNT="9", OMP_WAIT_POLICY="active").environment
    assert (cpu["OMP_NUM_THREADS"], cpu["GOMP_SPINCOUNT"], cpu["OMP_WAIT_POLICY"]) == ("3", "9", "active")
    assert "PYTHONUNBUFFERED" not in planned(PYTHONUNBUFFERED="").environment
    assert planned(gpus=1, PYTORCH_ALLOC_CONF="x:1").environment["PYTORCH_ALLOC_CONF"] == "x:1"
    assert "PYTORCH_ALLOC_CONF" not in planned(gpus=1, PYTORCH_CUDA_ALLOC_CONF="x:1").environment


# GPUs

LISTING = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa-1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb-2)
  MIG 1g.10gb     Device  0: (UUID: MIG-cccc-3)
"""


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        *[(None, 2), ("", 0), ("0", 1), ("1,0", 2), (" 0 , 1 ", 2), ("-1", 0), ("0,-1,1", 1), ("0,7,1", 1)],
        *[("GPU-bbbb-2", 1), ("GPU-b", 1), ("GPU-x", 0), ("MIG-cccc-3", 1), ("NoDevFiles", 0)],
    ],
)
def test_visible_gpus(visible, count):
    assert visible_gpus(LISTING, visible) == count


def test_no_gpu_in_a_complaint_of_nvidia_smi():
    assert visible_gpus("No devices were found\n", None) == 0


def nvidia_smi(folder: Path, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\nexit {code}\n")
    program.chmod(0o755)


def test_count_gpus_asks_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher.importlib.metadata, "version", lambda name: "2.13.0+cu130")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    nvidia_smi(tmp_path)
    assert launcher.count_gpus({}) == 2
    assert launcher.count_gpus({"CUDA_VISIBLE_DEVICES": "1"}) == 1
    nvidia_smi(tmp_path, code=9)
    assert launcher.count_gpus({}) == 0


def test_a_cpu_build_of_torch_sees_no_gpu_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launcher.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    nvidia_smi(tmp_path)

    assert launcher.count_gpus({}) == 0
    assert "2 GPUs present, but torch 2.13.0+cpu is a CPU build" in capsys.readouterr().err


# The command


WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(name, path, target=None):
        assert name.partition(".")[0] != "torch", "torch is imported"

sys.meta_path.insert(0, NoTorch)
from octavo.launch.launcher import main
sys.exit(main())
"""


def command(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """octavo.launch.launcher in a process where importing torch fails."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *argv],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.mark.parametrize(
    ("argv", "environ", "complaint"),
    [
        (["--training.seq_len", "0"], {}, "seq_len"),
        (["--float8.recipe_name=rowise"], {}, "rowwise"),
        (["--training.global_batch_size=16"], {"NGPU": "3"}, "global_batch_size"),
        (["--training.dataset=/no/such/corpus"], {}, "/no/such/corpus"),
        ([], {"CONFIG_FILE": "llama3_8b.toml"}, " download --repo_id meta-llama/Llama-3.1-8B"),
        (["--job.config_file=~nobody-of-this-name/x"], {}, "there is no home folder ~nobody"),
        ([], {"CONFIG_FILE": "~nobody-of-this-name/x"}, "there is no home folder ~nobody"),
        ([], {"CONFIG_FILE": "a" * 300}, "File name too long"),
        ([], {"NGPU": "0"}, "NGPU=0"),
    ],
)
def test_a_bad_command_is_told_before_torch_is_imported(argv, environ, complaint):
    ended = command(*argv, **environ)

    assert ended.returncode == 2, ended.stderr
    assert complaint in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_check_only_starts_nothing(capsys, monkeypatch):
    monkeypatch.setattr(launcher, "count_gpus", lambda environ: 0)
    monkeypatch.setattr(launcher, "run", lambda planned: pytest.fail("it was started"))
    monkeypatch.setenv("CHECK_ONLY", "1")
    assert launcher.main(["--training.steps=2"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("NNODES", "2")
    assert launcher.main([]) == 2
    assert capsys.readouterr().err == (
        "octavo: RDZV_ENDPOINT=: NNODES=2 needs host:port of one of the machines, the same on all, "
        "such as node0:29500\n"
    )


def test_help_is_printed_once_with_options_and_variables():
    ended = command("--training.steps=0", "--help", NGPU="0")

    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    for once in ("--training.steps", "CONFIG_FILE    ", "NGPU    ", "LOG_RANK  ", "OCTAVO_TORCH_INDEX\n"):
        assert ended.stdout.count(once) == 1, once


@pytest.mark.parametrize("module", ["octavo.launch", "octavo.train"])
def test_nothing_in_the_working_directory_is_executed(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A downloaded model's folder may hold a file with the name of a module that Python or torch imports."""
    for name in ("tokenize", "random", "torch", "sitecustomize", "octavo", "json"):
        (tmp_path / f"{name}.py").write_text(f"open('executed', 'w').write('{name}')")
    monkeypatch.chdir(tmp_path)
    environment = os.environ | planned(PYTHONPATH=os.environ["PYTHONPATH"]).environment
    ended = subprocess.run(
        [sys.executable, "-P", "-m", module, *(["--help"] if module == "octavo.train" else [])],
        env={**environment, "CHECK_ONLY": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({"SLURM_NNODES": "2"}, "SLURM_NNODES=2, but NNODES is not set.* NNODES=2 and RDZV_ENDPOINT"),
        ({"PET_NNODES": "2:4"}, "PET_NNODES=2:4, .* NNODES=4"),
        ({"SLURM_JOB_NUM_NODES": "3"}, "NNODES=3"),
        ({"SLURM_NNODES": "1", "PET_NNODES": "1:1"}, None),
        ({"SLURM_NNODES": "2", "NNODES": "1"}, None),
        ({"SLURM_NNODES": "two"}, None),
    ],
)
def test_machines_that_would_stay_unused_are_reported(environ, wanted, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "count_gpus", lambda environ: 0)
    monkeypatch.setattr(launcher, "run", lambda planned: 0)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert launcher.main([]) == 0
    err = capsys.readouterr().err
    assert re.search(wanted, err) if wanted else err == ""


def test_rank_0_of_one_machine_is_no_error():
    assert planned(NODE_RANK="0").processes == 1
