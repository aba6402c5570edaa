"""How tokens get to their experts and back. No token is dropped.

    rows, ends, route = dispatcher.send(x, experts)     a row per (token, choice), sorted by expert
    tokens = dispatcher.bring_back(expert outputs, route)     in the order of (token, choice)

`LocalDispatcher` is for processes that hold all experts. Expert parallelism is another dispatcher with the
same two methods, which exchanges rows between processes.

Shapes: T tokens, C choices per token, R = T C rows, E experts, D model width.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Route(NamedTuple):
    """The way back: `order_R[r]` is the number of row r's (token, choice), and `place_R` its inverse."""

    order_R: Tensor
    place_R: Tensor
    choices: int


class Dispatcher(Protocol):
    def send(self, x_TD: Tensor, experts_TC: Tensor, load_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The rows `[R, D]` of this process's experts, where each expert's rows end (int32 `[E]`), and the
        route. `load_E`: how many rows each expert gets.
        """

    def bring_back(self, y_RD: Tensor, route: Any) -> Tensor:
        """The rows `[T, C, D]` in the tokens' order."""


class _Rows(torch.autograd.Function):
    """`x[index // copies]`: rows of x, each copied `copies` times, in the order `index`. `back`: its inverse.

    Backward is a gather as well, so that it is deterministic; that of indexing adds by atomic operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x[index // copies]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return grads[0][back].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class LocalDispatcher:
    """Sorts the rows by expert within this process."""

    def send(self, x_TD: Tensor, experts_TC: Tensor, load_E: Tensor) -> tuple[Tensor, Tensor, Route]:
        order_R = experts_TC.flatten().argsort(stable=True)
        place_R = torch.empty_like(order_R).scatter_(
            0, order_R, torch.arange(order_R.numel(), device=order_R.device)
        )
        choices = experts_TC.shape[1]
        rows_RD = _Rows.apply(x_TD, order_R, place_R, choices)
        return rows_RD, load_E.cumsum(0).int(), Route(order_R, place_R, choices)

    def bring_back(self, y_RD: Tensor, route: Route) -> Tensor:
        rows: Tensor = _Rows.apply(y_RD, route.place_R, route.order_R, 1)
        return rows.unflatten(0, (-1, route.choices))
