"""Balances the load of experts, and reports it.

Each router counts how many choices each of its experts got. Before an update the counts are summed over the
processes that have seen different tokens. Where a family chooses by a bias, the bias then moves by
`bias_rate`: down for experts above the mean load, and up for those below (arXiv:2408.15664).
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from octavo.distributed.mesh import World
from octavo.metrics.jsonl import Jsonl
from octavo.metrics.logger import MetricsLogger
from octavo.models.moe import Router, routers
from octavo.train.hooks import GuardAction, Hook, StepRecord


@torch.no_grad()
def move_bias(router: Router, load_E: Tensor) -> None:
    """One step towards balance; `load_E`: choices of each expert, of all tokens of the step."""
    if router.bias is not None:
        router.bias += router.args.bias_rate * (load_E.mean() - load_E).sign()
        router.bias -= router.bias.mean()


class BalanceExperts(Hook):
    """Does nothing for a model without experts. `experts.jsonl` gets a line per layer and reported step: the
    share of choices of each expert, and the largest, as a multiple of the mean.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        metrics: MetricsLogger,
        folder: Path | None,
        *,
        global_tokens: int,
    ):
        self._world, self._metrics = world, metrics
        self._file = Jsonl(folder / "experts.jsonl") if folder else None
        self._routers = routers(model)
        found = torch.tensor(float(len(self._routers)), device=world.sharding.device_type)
        self._has_experts = bool(found if world.pipeline is None else world.sum(found))
        self._loads: dict[str, Tensor] = {}
        for router in self._routers.values():
            router.loss_per_token = router.args.balance_loss / global_tokens
            router.load.zero_()

    def on_start(self, step: int) -> None:
        if self._file and self._has_experts:
            self._file.start(step)

    def before_step(self, step: int) -> None:
        for router in self._routers.values():  # a diagnosis or a trial of recipes may have counted
            router.load.zero_()

    def before_update(self, record: StepRecord) -> None:
        self._loads = self._sum_loads()
        if record.verdict.action is GuardAction.UPDATE:
            for name, router in self._routers.items():
                move_bias(router, self._loads[name])

    def after_step(self, record: StepRecord) -> None:
        if not self._metrics.due(record.step) or not self._has_experts:
            return
        shares = {name: (load_E / load_E.sum()).tolist() for name, load_E in self._loads.items()}
        if self._world.pipeline is not None:
            stages: list[dict[str, list[float]]] = [{}] * self._world.pipeline.size()
            dist.all_gather_object(stages, shares, group=self._world.pipeline.get_group())
            shares = {name: share for stage in stages for name, share in stage.items()}
        largest = {name: max(share) * len(share) for name, share in shares.items()}
        if self._file:
            self._file.write(
                *(
                    {"step": record.step, "layer": name, "largest": largest[name], "shares": share}
                    for name, share in shares.items()
                )
            )
        self._metrics.track(record.step, {f"experts/largest/{name}": x for name, x in largest.items()})

    def _sum_loads(self) -> dict[str, Tensor]:
        if not self._routers:
            return {}
        loads = torch.stack([router.load for router in self._routers.values()])
        mesh = self._world.sharding
        for axis in range(mesh.ndim):
            dist.all_reduce(loads, group=mesh.get_group(axis))
        return dict(zip(self._routers, loads, strict=True))
