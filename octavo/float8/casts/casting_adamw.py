"""AdamW whose step also casts the weights for the next step.

    optimizer = Float8AdamW(model.parameters(), model=model, lr=3e-4)
    for step in steps:
        with cast_weights_once(model):
            ...                       # casts no weight: the last optimizer step made the casts
        optimizer.step()

An optimizer step reads and writes every weight; casting the weights reads them again. On a GPU the kernels of
`kernels/adamw_cast.py` update and cast in one pass for 128 x 128 blocks. For one scale per tensor or per row
they compute the maxima on the way, and one more pass casts. Elsewhere the step is torch.optim.AdamW's, and
the weights are cast after it, with the same bits as casting them in the next step.

It is a torch.optim.AdamW with the same options, state and state dict, so that checkpoints of both are
interchangeable. Only whole, unsharded weights are cast; sharded ones (FSDP, tensor parallelism) and all other
parameters take torch's step. The kernels differ from torch's step by float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT, StateDict

from octavo.float8.casts import gpu_cast
from octavo.float8.casts.operands import cast_weight
from octavo.float8.linear import Float8Linear
from octavo.float8.quantize import Casts, Quantized
from octavo.float8.recipe import FULL, Cast


def _kernel_casts(row: Cast | None, col: Cast | None) -> bool:
    """Whether one kernel makes both casts of a weight as it steps."""
    return row is not None and row == col and row.block in ((FULL, FULL), (1, FULL), (128, 128))


class Float8AdamW(torch.optim.AdamW):
    """torch.optim.AdamW that casts the weights of the `Float8Linear`s in `model` as it steps.

    Options are AdamW's. Raises ValueError if `model` has no such layer.

    Between a step and the next `cast_weights_once`, do not write to the weights through `.data`, with
    `vector_to_parameters` or with a fused optimizer: that is not noticed, and the old casts would be used.
    Writes under `no_grad`, loaded state dicts and new parameters are noticed.
    """

    def __init__(self, params: ParamsT, *, model: nn.Module, **options: Any) -> None:
        super().__init__(params, **options)
        linears = [m for m in model.modules() if isinstance(m, Float8Linear)]
        if not linears:
            raise ValueError(
                f"Float8AdamW casts the weights of Float8Linears, and {type(model).__name__} has none: call "
                "convert_to_float8_training first, or use torch.optim.AdamW"
            )
        self._linears = linears
        self._steps: dict[Tensor, int] = {}  # copies of those in `state`: reading a GPU's would synchronize

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every parameter that has a gradient, and cast the weights among them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        linears = {id(m.weight): m for m in self._linears if type(m.weight) is nn.Parameter}
        stepped = [m for m in linears.values() if m.weight.grad is not None]
        kernel_stepped: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                linear = linears.get(id(p))
                if linear is not None and p.grad is not None and self._kernel_can_step(p, linear, group):
                    linear.weight_cache.store(p, self._step_and_cast(p, linear, group))
                    kernel_stepped[p], p.grad = p.grad, None
                else:
                    self._steps.pop(p, None)  # torch steps it
        super().step()
        for p, grad in kernel_stepped.items():
            p.grad = grad
        for linear in stepped:
            if linear.weight not in kernel_stepped:
                casts = cast_weight(linear.weight.detach(), linear.recipe, for_grad_input=True)
                linear.weight_cache.store(linear.weight, casts)
        return loss

    def load_state_dict(self, state_dict: StateDict) -> None:
        super().load_state_dict(state_dict)
        self._steps.clear()

    def _kernel_can_step(self, p: Tensor, linear: Float8Linear, group: dict[str, Any]) -> bool:
        row, col = linear.recipe.output.b, linear.recipe.grad_input.b
        unsupported = any(group[name] for name in ("amsgrad", "maximize", "capturable", "differentiable"))
        return (
            not unsupported
            and isinstance(group["lr"], float | int)
            and p.is_contiguous()
            and p.grad is not None
            and p.grad.is_contiguous()
            and _kernel_casts(row, col)
            and gpu_cast.supports(p, row)
        )

    def _step_and_cast(self, p: Tensor, linear: Float8Linear, group: dict[str, Any]) -> Casts:
        from octavo.float8.kernels import ops  # triton, at its first use
        from octavo.float8.kernels.adamw_cast import Step

        state = self.state[p]
        if not state:  # as torch.optim.AdamW creates it
            device = p.device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        if p not in self._steps:
            self._steps[p] = int(state["step"])
        state["step"] += 1
        self._steps[p] += 1
        step = Step.of(
            self._steps[p],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        assert p.grad is not None
        cast = linear.recipe.output.b
        assert cast is not None
        numbers = [step.decay, step.beta1, step.beta2, step.rate, step.root, step.eps]
        tensors = p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"]
        dtype, scales = cast.dtype, cast.scale.value
        if cast.block[0] == 128:
            data, data_t, scale = ops.adamw_with_squares(*tensors, numbers, 128, dtype, scales, None)
            scale_t = scale.t()
        else:
            rows, columns = ops.adamw_with_maxima(*tensors, numbers, None)
            if cast.square:
                data, data_t, scale = ops.cast_by_tensor_with_maxima(
                    p.detach(), rows.amax().view(1), dtype, scales, True, True
                )
                scale_t = scale.t()
            else:
                data, scale, data_t, scale_t = ops.cast_with_maxima(p.detach(), rows, columns, dtype, scales)
        return Quantized(data, scale), Quantized(data_t, scale_t)
