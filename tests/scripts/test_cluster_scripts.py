"""What runs on each machine of a cluster, and the manifests that start it there."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.helpers import ranks, warm
from tests.helpers.waiting import LIMIT

SCRIPTS = ROOT / "scripts"
SMI = """#!/bin/bash
case $* in
  -L) {listing} ;;
  *ecc*) printf '%b' '{ecc}' ;;
  *compute-apps*) printf '{busy}' ;;
esac
"""
TWO = "printf 'GPU 0: NVIDIA H100 (UUID: a)\\nGPU 1: NVIDIA H100 (UUID: b)\\n'"


def check(tmp_path: Path, *, listing=TWO, ecc="0, 0\\n1, 0\\n", busy="", **environ):
    """Runs the health check with a nvidia-smi of ours."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI.format(listing=listing, ecc=ecc, busy=busy))
    smi.chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DUMP_FOLDER": str(tmp_path),
        "MIN_FREE_GB": "0",
        "RDZV_TIMEOUT": "1",
    }
    return subprocess.run(
        ["bash", SCRIPTS / "health_check.sh"],
        env={**os.environ, **variables, **environ},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_a_machine_that_is_fit(tmp_path):
    fit = check(tmp_path, GPUS="0", RDZV_ENDPOINT="localhost:1")
    assert fit.returncode == 0, fit.stderr
    assert re.search(r"octavo: \S+ is fit: 0 GPUs, \d+ GB free in ", fit.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-smi"]


@pytest.mark.parametrize(
    ("how", "environ", "told"),
    [
        ({}, {"NGPU": "3"}, "2 GPUs are visible, of 3"),
        ({"listing": "echo 'driver mismatch'; exit 9"}, {"NGPU": "2"}, "nvidia-smi fails: driver mismatch"),
        ({"ecc": "0, 0\\n1, 4\\n"}, {"NGPU": "2"}, "not corrected: GPU 1: 4; reset or replace it"),
        ({"busy": "123"}, {"NGPU": "2"}, "in use already, by the processes 123"),
        ({}, {"GPUS": "0", "MIN_FREE_GB": "99999999"}, "GB free, of 99999999 (MIN_FREE_GB)"),
        ({}, {"GPUS": "0", "DUMP_FOLDER": "/proc/nowhere"}, "/proc/nowhere cannot be written"),
        ({}, {"GPUS": "0", "RDZV_ENDPOINT": "no-such-host.invalid:1"}, "no-such-host.invalid, where"),
    ],
)
def test_a_machine_that_is_not_fit_says_why(tmp_path, how, environ, told):
    found = check(tmp_path, **how, **environ)
    assert found.returncode == 1
    assert told in found.stderr
    assert found.stderr.startswith("octavo: ")


def test_a_name_that_resolves_only_after_a_while_is_waited_for(tmp_path):
    """As a pod's does under Kubernetes."""
    for name, text in (
        ("getent", f"#!/bin/bash\necho >>{tmp_path}/asked\n((`wc -l <{tmp_path}/asked` > 3))\n"),
        ("sleep", "#!/bin/bash\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    fit = check(tmp_path, GPUS="0", RDZV_ENDPOINT="node-0:1", RDZV_TIMEOUT="100")
    assert fit.returncode == 0, fit.stderr
    assert "node-0, where the machines meet, has no address yet; waiting up to 100 s" in fit.stderr


@pytest.fixture
def node(tmp_path):
    """A checkout in which training is a script of ours."""
    (tmp_path / "scripts").mkdir()
    for name in ("python_env.sh", "check_collectives.py"):
        (tmp_path / "scripts" / name).symlink_to(SCRIPTS / name)
    for name, text in (
        ("scripts/run_node.sh", (SCRIPTS / "run_node.sh").read_text()),
        (
            "scripts/health_check.sh",
            "#!/bin/bash\n[[ -z $SLOW ]] || { echo checks; exec sleep 1000; }\nexit ${UNFIT:-0}\n",
        ),
        (
            "run_train.sh",
            '#!/bin/bash\n[[ -z $CHECK_ONLY ]] || exit "${WRONG:-0}"\n'
            "trap 'sleep 0.5; echo saved; exit 75' TERM\necho \"$@\"\n"
            '[[ -z $ENDS ]] || exit "$ENDS"\nfor _ in {1..9999}; do sleep 0.1; done\n',
        ),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(*options: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", tmp_path / "scripts/run_node.sh", *options],
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.mark.parametrize(
    ("environ", "code"),
    [
        ({"ENDS": "0"}, 0),
        ({"ENDS": "2"}, 2),
        ({"ENDS": "75"}, 75),
        ({"UNFIT": "1"}, 1),
        ({"WRONG": "2", "NNODES": "2"}, 2),  # before the machines look for each other
        ({"ENDS": "75", "RETRY_EXIT_CODE": "143"}, 143),
        ({"ENDS": "1", "RETRY_EXIT_CODE": "143"}, 143),
        ({"ENDS": "4", "RETRY_EXIT_CODE": "143"}, 4),
    ],
)
def test_exit_codes_of_a_machine(node, environ, code):
    process = node("--a=b c", **environ)
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == code
    assert out.startswith("--a=b c\n") != ("UNFIT" in environ or "WRONG" in environ)


def test_a_signal_reaches_training_and_its_save_is_waited_for(node):
    process = node("x")
    assert process.stdout.readline() == "x\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (75, "saved\n")


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_during_a_check_ends_it_and_nothing_is_lost(node, sent):
    process = node("x", SLOW="1")
    assert process.stdout.readline() == "checks\n"
    process.send_signal(sent)
    out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (75, "")


def test_machines_without_numbers_check_that_they_reach_each_other(node):
    environ = {
        "NNODES": "2",
        "NGPU": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{ranks.free_port()}",
        "RDZV_TIMEOUT": f"{LIMIT:.0f}",
        "OCTAVO_PYTHON": warm.python(),
        "ENDS": "0",
    }
    machines = [node("x", **environ) for _ in range(2)]
    outs = [machine.communicate(timeout=LIMIT)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outs
    assert "octavo: 2 processes reach each other by gloo" in "".join(outs)
    assert "Traceback" not in "".join(outs)


# Manifests. What is required, and under which names, is from the CRDs: JobSet v1alpha2, PyTorchJob v1.


def manifest(name: str):
    return yaml.safe_load((SCRIPTS / "kubernetes" / name).read_text())


def pods():
    """Every pod template, with the job that it is in."""
    (job,) = manifest("jobset.yaml")["spec"]["replicatedJobs"]
    yield job["template"]["spec"]["template"]["spec"]
    for replica in manifest("pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"].values():
        yield replica["template"]["spec"]


def test_the_jobset_restarts_all_pods_but_for_codes_that_would_come_again():
    found = manifest("jobset.yaml")
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = found["spec"]["replicatedJobs"]
    inner = job["template"]["spec"]
    assert inner["completionMode"] == "Indexed"
    assert inner["backoffLimit"] == 0
    (rule,) = inner["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    (container,) = inner["template"]["spec"]["containers"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 3, 4]}
    (named,) = found["spec"]["failurePolicy"]["rules"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", named.pop("name"))
    assert named == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert found["spec"]["failurePolicy"]["restartStrategy"] in ("Recreate", "BlockingRecreate")
    assert inner["template"]["spec"]["restartPolicy"] == "Never"  # a pod failure policy allows no other
    env = {one["name"]: one["value"] for one in container["env"]}
    assert int(env["NNODES"]) == inner["parallelism"] == inner["completions"]
    host, _, port = env["RDZV_ENDPOINT"].partition(":")
    name = found["metadata"]["name"]
    assert host == f"{name}-{job['name']}-0-0.{name}"
    assert int(port) == container["ports"][0]["containerPort"]


def test_the_pytorchjob_restarts_by_exit_code():
    found = manifest("pytorchjob.yaml")
    assert (found["apiVersion"], found["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = found["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master", "Worker"]
    assert replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert replica["restartPolicy"] == "ExitCode"
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        env = {one["name"]: one["value"] for one in container["env"]}
        assert int(env["NNODES"]) == sum(one["replicas"] for one in replicas.values())
        assert int(env["RETRY_EXIT_CODE"]) >= 128
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert env["RDZV_ENDPOINT"] == f"{found['metadata']['name']}-master-0:{ports['pytorchjob-port']}"
        assert ports["check-port"] == ports["pytorchjob-port"] + 1  # run_node.sh's


def test_pods_have_time_to_save_and_memory_to_share():
    found = list(pods())
    assert len(found) == 3
    for pod in found:
        assert pod["terminationGracePeriodSeconds"] >= 300
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert volumes.keys() == set(mounts.values())


def test_pods_are_valid_by_kubernetes_own_schema():
    validate = pytest.importorskip("kubernetes_validate")
    (job,) = manifest("jobset.yaml")["spec"]["replicatedJobs"]
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
    validate.validate(inner, "1.31", strict=True)
    for pod in pods():
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
        validate.validate(whole, "1.31", strict=True)


def test_the_skypilot_task():
    task = yaml.safe_load((SCRIPTS / "skypilot/llama3_8b.yaml").read_text())
    known = {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert task.keys() <= known
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75], "max_restarts_on_errors": 3}
    assert task["num_nodes"] == 2
    assert task["file_mounts"]["/checkpoints"]["mode"] == "MOUNT"  # the others are a copy for each machine
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for variable in ("NUM_NODES", "NODE_RANK", "NUM_GPUS_PER_NODE", "NODE_IPS", "TASK_ID"):
        assert f"$SKYPILOT_{variable}" in task["run"]


def test_every_option_in_the_scripts_is_one_of_octavos():
    from octavo.config.schema import ALIASES, SECTIONS

    texts = [path.read_text() for path in SCRIPTS.rglob("*") if path.suffix in (".yaml", ".sbatch")]
    options = set(re.findall(r"--([a-z0-9_]+)\.([a-z0-9_]+)", "".join(texts)))
    assert len(options) > 5
    assert all(name in SECTIONS[section] or (section, name) in ALIASES for section, name in options)
