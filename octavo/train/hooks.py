"""Hooks: whatever watches training, called at fixed points of every step.

    on_start(step)          training starts after `step` steps: at the beginning, on resuming, after a rewind
    before_step(step)       nothing of the step has happened yet
    after_backward(record)  the gradients are complete, over all microbatches and processes, and not clipped
    before_update(record)   they are clipped; loss and gradient norm are known, and the guard has judged them
    after_step(record)      the step is over, with or without an update
    on_end()                training is over: finished, stopped, or failed

Every process calls every hook, in the same order, so a hook may call collectives. Octavo's own hooks come
first (`Trainer.__init__` lists them); hooks that you `register` follow, in the order of registration.
`on_end` runs in the reverse order. An exception in a hook ends the run.

To add a hook, write a `Hook` in a module of your own, `register` it there, and name the module in
`experimental.custom_import`. `docs/metrics.md` has an example.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from octavo.train.trainer import Trainer


class GuardAction(Enum):
    """What to do with a step once its gradients are computed."""

    UPDATE = "update"
    SKIP = "skip"
    REWIND = "rewind"
    STOP = "stop"


@dataclass(frozen=True)
class StepVerdict:
    """reason: what is wrong with the step, or empty. non_finite: whether a number is not finite."""

    action: GuardAction
    reason: str = ""
    non_finite: bool = False


@dataclass
class StepRecord:
    """One optimizer step. Fields are known from the hook on that is named with them.

    step: its number, from 1. lr: its learning rate. batches: (tokens, labels) of this process's microbatches,
    int64 [B, S]. data_seconds: time waiting for them. local_loss: this process's share of the loss, a scalar;
    the sum over processes is the loss (all `after_backward`).

    loss, grad_norm: over all processes, the norm before clipping. stops: number of processes that were asked
    to stop. verdict: what the guard decides (all `before_update`).

    tokens_seen: by all processes since the run began, with this step's (`after_step`).
    """

    step: int
    lr: float
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    data_seconds: float = 0.0
    local_loss: Tensor = field(init=False)
    loss: float = field(init=False)
    grad_norm: float = field(init=False)
    stops: float = field(init=False)
    verdict: StepVerdict = StepVerdict(GuardAction.UPDATE)
    tokens_seen: int = field(init=False)

    @property
    def abandoned(self) -> bool:
        """Whether the run ends with this step or goes back to a checkpoint: nothing is saved after it."""
        return self.verdict.action in (GuardAction.STOP, GuardAction.REWIND)


class Hook:
    """Does nothing at any point. Override what you need; see the top of this file for the points."""

    def on_start(self, step: int) -> None: ...

    def before_step(self, step: int) -> None: ...

    def after_backward(self, record: StepRecord) -> None: ...

    def before_update(self, record: StepRecord) -> None: ...

    def after_step(self, record: StepRecord) -> None: ...

    def on_end(self) -> None: ...


class Hooks(Hook):
    """Several hooks as one: calls each in order."""

    def __init__(self, hooks: Sequence[Hook]):
        self._hooks = tuple(hooks)

    def on_start(self, step: int) -> None:
        for hook in self._hooks:
            hook.on_start(step)

    def before_step(self, step: int) -> None:
        for hook in self._hooks:
            hook.before_step(step)

    def after_backward(self, record: StepRecord) -> None:
        for hook in self._hooks:
            hook.after_backward(record)

    def before_update(self, record: StepRecord) -> None:
        for hook in self._hooks:
            hook.before_update(record)

    def after_step(self, record: StepRecord) -> None:
        for hook in self._hooks:
            hook.after_step(record)

    @contextmanager
    def running(self, step: int) -> Iterator[None]:
        """The scope of training that starts after `step` steps; each hook's `on_end` is called at its end."""
        with ExitStack() as stack:
            for hook in self._hooks:
                stack.callback(hook.on_end)
                hook.on_start(step)
            yield


MakesHook = TypeVar("MakesHook", bound=Callable[["Trainer"], Hook])
_registered: list[Callable[["Trainer"], Hook]] = []


def register(make: MakesHook) -> MakesHook:
    """Add a hook to every trainer built from now on. `make` takes the `Trainer` and returns the hook; as a
    decorator of a class, its constructor does so. Raises TypeError for a class that is no `Hook`.
    """
    if not callable(make) or (isinstance(make, type) and not issubclass(make, Hook)):
        name = getattr(make, "__name__", repr(make))
        raise TypeError(f"{name} is no hook: derive it from octavo.train.hooks.Hook")
    _registered.append(make)
    return make


def make_registered(trainer: "Trainer") -> list[Hook]:
    """One of each registered hook, for `trainer`."""
    return [make(trainer) for make in _registered]
