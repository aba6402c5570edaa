"""wandb and trackio, with fake modules: what is sent, that a resumed run keeps its id, that no
secret reaches them, and that their failures cost curves only.
"""

import json
import sys
from types import SimpleNamespace

import pytest

from octavo.config import ConfigError, JobConfig
from octavo.metrics import trackers
from octavo.metrics.trackers import Service, TensorBoard
from octavo.preflight import check

KEY = "0123456789abcdef0123456789abcdef01234567"


class Fake(SimpleNamespace):
    """Notes every call; `fails` raises it."""

    def __init__(self, fails=()):
        super().__init__(calls=[], fails=fails)

    def _note(self, called, /, *args, **kwargs):
        self.calls.append((called, args, kwargs))
        if called in self.fails:
            raise RuntimeError(f"no such key: {KEY}")
        return self

    def __getattr__(self, name):
        return lambda *args, **kwargs: self._note(name, *args, **kwargs)


@pytest.fixture
def fake(monkeypatch):
    for variable in ("PROJECT", "TEAM", "ENTITY", "RUN_ID", "NAME"):
        monkeypatch.delenv(f"WANDB_{variable}", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)

    def install(package, **kwargs):
        module = Fake(**kwargs)
        monkeypatch.setitem(sys.modules, package, module)
        return module

    return install


def made(module, name):
    return [(args, kwargs) for called, args, kwargs in module.calls if called == name]


def test_wandb_gets_values_steps_and_configuration(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "pretraining")
    monkeypatch.setenv("WANDB_TEAM", "us")
    module = fake("wandb")
    job = JobConfig()
    job.job.description = f"my key is {KEY}"
    run = Service("wandb", tmp_path, job.to_dict(), job.job.description, resumed=False)
    run.write({"lr": 0.5}, 3)
    run.close()
    ((_, options),) = made(module, "init")
    assert (options["project"], options["entity"]) == ("pretraining", "us")
    assert options["config"]["training"]["seq_len"] == 2048
    assert options["notes"] == "my key is ***"
    assert KEY not in json.dumps(options)
    assert made(module, "define_metric") == [(("*",), {"step_metric": "step"})]
    assert made(module, "log") == [(({"lr": 0.5, "step": 3},), {})]
    assert len(made(module, "finish")) == 1


def test_trackio_gets_values_and_steps(fake, tmp_path):
    module = fake("trackio")
    run = Service("trackio", tmp_path, {}, "", resumed=False)
    run.write({"lr": 0.5}, 3)
    ((_, options),) = made(module, "init")
    assert (options["project"], options["resume"]) == ("octavo", "allow")
    assert made(module, "log") == [(({"lr": 0.5},), {"step": 3})]


@pytest.mark.parametrize(("package", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_goes_on_as_itself(fake, tmp_path, package, key):
    module = fake(package)
    for resumed in (False, True, True, False):
        Service(package, tmp_path, {}, "", resumed=resumed)
    one, again, and_again, new = (options[key] for _, options in made(module, "init"))
    assert one == again == and_again != new


def test_who_does_not_start_is_told_without_the_key(fake, tmp_path):
    fake("wandb", fails=("init",))
    with pytest.raises(ConfigError, match="enable_wandb = true: wandb did not start: RuntimeError") as caught:
        Service("wandb", tmp_path, {}, "", resumed=False)
    assert KEY not in str(caught.value)


def test_who_fails_later_is_left_alone(fake, tmp_path, monkeypatch):
    module = fake("wandb", fails=("log",))
    warnings = []
    monkeypatch.setattr(trackers.logger, "warning", lambda text, *args: warnings.append(text % args))
    run = Service("wandb", tmp_path, {}, "", resumed=False)
    for step in range(3):
        run.write({"lr": 0.5}, step)
    run.close()
    assert len(made(module, "log")) == 1
    assert len(warnings) == 1
    assert KEY not in warnings[0]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_missing_package_is_told_before_any_work(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        Service(package, tmp_path, {}, "", resumed=False)
    monkeypatch.delitem(sys.modules, package)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    job = JobConfig()
    setattr(job.metrics, f"enable_{package}", True)
    with pytest.raises(ConfigError, match=rf"metrics.enable_{package} = true .* pip install {package}"):
        check(job, world_size=1)


def test_tensorboard_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard is not installed"):
        TensorBoard(tmp_path)
