"""AdamW with moments of two bytes per parameter, or one, for models whose float32 moments do not fit.

    AdamW with m, v in float32   8 bytes per parameter
    `AdamW`, bfloat16            4
    `AdamW8bit`                  2, and one float32 per block of 256 and moment

bfloat16 has 8 bits of precision: with rounding to nearest, a moment or weight that changes by less than about
0.4 % per step would never change. So values stored in bfloat16 are rounded stochastically, which is unbiased;
arithmetic is in float32. The random bits are a function of the step and the parameter's index, so that a
resumed run equals an uninterrupted one, and replicas of a parameter stay equal. Parameters may be bfloat16
too (`training.dtype`).

`AdamW8bit` leaves moments to bitsandbytes' kernels: blocks of 256 numbers share a scale, and each is one of
256 of a dynamic map (arXiv:2110.02861). Parameters under 4,096 elements keep float32 moments. It needs
unsharded parameters, because blocks depend on the sharding. Its kernels round bfloat16 weights to nearest.

Both update one parameter at a time, in pieces, so that the temporary float32 copies stay small. AdamW:
arXiv:1711.05101.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from octavo.optim import one_kernel

PIECE = 1 << 24
"""Elements that are updated at a time."""

LEAST_8BIT = 4096
BLOCK_8BIT = 256


def _steps(state: dict[str, Any]) -> int:
    """The number of steps of a parameter; 1 for fake tensors, which have no values."""
    done = state["step"]
    return 1 if isinstance(done, FakeTensor) else int(done.item())


def _in_one_kernel(w: Tensor) -> bool:
    """Whether `w` is updated by `one_kernel`: on GPUs. CPUs round with a generator's random bits."""
    return w.is_cuda and not isinstance(w, FakeTensor)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def store(into: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write float32 `value` to `into`, rounded stochastically if that is bfloat16. Non-finite values are
    kept.
    """
    if into.dtype == torch.bfloat16:
        noise = torch.randint(
            0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator
        )
        value = one_kernel.rounded(value, noise, into.dtype)
    into.copy_(value)


class AdamW(torch.optim.Optimizer):
    """AdamW with moments in `state_dtype`, float32 or bfloat16."""

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        state_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_dtype = state_dtype
        self._generators: dict[torch.device, torch.Generator] = {}
        self._numbers: tuple[Any, Tensor] | None = None

    def _parameters(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        place = 0
        for group in self.param_groups:
            for p in group["params"]:
                yield place, group, p
                place += 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "a closure would need gradients of its own"
        for place, group, p in self._parameters():
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                self._new_state(p, state)
            state["step"] += 1
            self._update(p, p.grad, state, group, place)

    def _new_state(self, p: Tensor, state: dict[str, Any]) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(p, dtype=self.state_dtype, memory_format=torch.preserve_format)

    def _generator(self, device: torch.device, step: int, place: int) -> torch.Generator:
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        return generator.manual_seed((step << 24) + place)

    def _update(
        self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], place: int
    ) -> None:
        beta1, beta2 = group["betas"]
        step = _steps(state)
        whole = [_local(t) for t in (p, grad, state["exp_avg"], state["exp_avg_sq"])]
        if _in_one_kernel(whole[0]):
            numbers = self._step_numbers(group, step, whole[0].device)
            update = one_kernel.compiled_update()
            for piece, (w, g, m, v) in enumerate(zip(*(_pieces(t) for t in whole), strict=True)):
                update(w, g, m, v, numbers, one_kernel.seed_of(step, place, piece))
            return
        generator = self._generator(whole[0].device, step, place)
        for w, g, m, v in zip(*(_pieces(t) for t in whole), strict=True):
            g = g.float()
            first, second = (
                m.float().lerp_(g, 1 - beta1),
                v.float().mul_(beta2).addcmul_(g, g, value=1 - beta2),
            )
            store(m, first, generator)
            store(v, second, generator)
            root = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
            new = w.float() * (1 - group["lr"] * group["weight_decay"])
            store(w, new.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**step)), generator)

    def _step_numbers(self, group: dict[str, Any], step: int, device: torch.device) -> Tensor:
        """`numbers` of `one_kernel.update`, copied to the device once per step without waiting for it."""
        beta1, beta2 = group["betas"]
        lr, decay, eps = group["lr"], group["weight_decay"], group["eps"]
        key = (step, device, lr, decay, beta1, beta2, eps)
        if self._numbers is None or self._numbers[0] != key:
            rate, correction = lr / (1 - beta1**step), 1 - beta2**step
            values = (1 - lr * decay, 1 - beta1, beta2, 1 - beta2, rate, correction, eps)
            host = torch.tensor(values, dtype=torch.float32, pin_memory=device.type == "cuda")
            self._numbers = key, host.to(device, non_blocking=True)
        return self._numbers[1]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load `state_dict` bit for bit; PyTorch alone would cast it to the parameters' dtype."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, (_, _, p) in zip(names, self._parameters(), strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else p.device
                    self.state[p][key] = value.detach().to(device, copy=True)


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Flat views of `x` with at most `PIECE` elements each; `x` itself if it is not contiguous."""
    return x.view(-1).split(PIECE) if x.is_contiguous() else (x,)


class AdamW8bit(AdamW):
    """AdamW with moments of one byte, by bitsandbytes. Takes whole parameters.

    The first step raises ImportError if bitsandbytes is missing, except for fake tensors.
    """

    def __init__(self, params: Iterable[Tensor], **settings: Any) -> None:
        super().__init__(params, state_dtype=torch.float32, **settings)
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _new_state(self, p: Tensor, state: dict[str, Any]) -> None:
        local = _local(p)
        if local.numel() < LEAST_8BIT:
            super()._new_state(p, state)
            return
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(local.shape, dtype=torch.uint8, device=local.device)
            blocks = -(-local.numel() // BLOCK_8BIT)
            state[f"{name}_amax"] = torch.zeros(blocks, dtype=torch.float32, device=local.device)

    def _map(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The code tables of the first (signed) and second (unsigned) moment."""
        if device not in self._maps:
            from bitsandbytes import functional

            signed, unsigned = (functional.create_dynamic_map(signed=s).to(device) for s in (True, False))
            self._maps[device] = signed, unsigned
        return self._maps[device]

    def _update(
        self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], place: int
    ) -> None:
        if state["exp_avg"].dtype != torch.uint8:
            super()._update(p, grad, state, group, place)
            return
        w = _local(p)
        if isinstance(w, FakeTensor):  # the kernels need real memory
            return
        from bitsandbytes import functional

        signed, unsigned = self._map(w.device)
        functional.optimizer_update_8bit_blockwise(
            "adam",
            _local(grad).to(w.dtype).contiguous(),
            w,
            state["exp_avg"],
            state["exp_avg_sq"],
            *group["betas"],
            0.0,
            0.0,
            group["eps"],
            _steps(state),
            group["lr"],
            signed,
            unsigned,
            state["exp_avg_amax"],
            state["exp_avg_sq_amax"],
            group["weight_decay"],
        )
