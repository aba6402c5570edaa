"""The output projection and its cross entropy, by chunks of tokens, so that the logits never exist whole.

    for each chunk of tokens c:   z = h_c . w^T;   loss += sum(logsumexp(z) - z[label]);
                                  dz = softmax(z) - onehot(label);   dh_c = dz . w;   dw += dz^T . h_c

For 8,192 tokens and a vocabulary of 128,256, float32 logits and their gradient take 8.4 GB; chunks of 1,024
tokens take an eighth of it. The gradients are computed in forward, while the logits are there: computing them
in backward would take the product z once more, 2 % of a Llama 3 8B step, to keep nothing else than one
gradient of the projection (V x D) from the loss to the start of backward, which follows at once. Backward
multiplies both by the loss's own gradient.

The sum over tokens runs chunk by chunk in float32, and so does dw, even where parameters are bfloat16 (4 V D
bytes while the loss is computed). Everything else is computed as the plain loss does: in float32 both differ
by the order of sums only, about 1e-7 relative. In bfloat16 the gradients are multiplied by the loss's scale
after they are rounded and not before, which is exact where that is a power of two, as 1 / (tokens in the
global batch) mostly is. With one float8 scale a tensor, or one for many tokens, a chunk's operand has a scale
of its own, as a smaller microbatch would have.

A head that is a module is called as a module, with the labels as second argument: FSDP2 gathers its
parameters then. `give_loss` makes it take them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label that `F.cross_entropy` passes over

Softmax = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def loss_and_gradient(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross entropy in float32, a scalar, and its gradient [C, V] in the logits' dtype."""
    z = logits_CV.float()
    counted = labels_C != IGNORED
    label = labels_C.where(counted, 0).unsqueeze(1)
    log_sum = z.logsumexp(dim=1, keepdim=True)
    nats = (log_sum - z.gather(1, label)).squeeze(1).where(counted, 0.0).sum()
    dz = (z - log_sum).exp().scatter_add(1, label, z.new_full((), -1.0).expand_as(label))
    return nats, dz.where(counted.unsqueeze(1), 0.0).to(logits_CV.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a . b`, in float32 also where a and b are narrower."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":  # the one device on which a narrow product is written in float32
        total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        total.addmm_(a.float(), b.float())


class _Loss(torch.autograd.Function):
    """A scalar of `h[T, D]`, `w[V, D]` and `labels[T]`. The gradients are made in forward."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, w: Tensor, labels: Tensor, products: Any, tokens: int, grads: bool
    ) -> Tensor:
        need_h, need_w = (grads and need for need in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h) if need_h else None
        dw = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if need_w else None
        for start in range(0, h.shape[0], tokens):
            chunk = slice(start, start + tokens)
            nats = products(h[chunk], labels[chunk], None if dh is None else dh[chunk], dw)
            total += nats
        ctx.save_for_backward(dh, None if dw is None else dw.to(w.dtype))
        ctx.spent = False
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("a chunked loss can be differentiated once: its gradients are scaled in place")
        ctx.spent = True
        dh, dw = (None if made is None else made.mul_(grads[0]) for made in ctx.saved_tensors)
        return dh, dw, None, None, None, None


@dataclass(frozen=True)
class ChunkedLoss:
    """tokens: of a chunk. softmax: `loss_and_gradient`, or its compiled form. casts_once: the scope in which
    a head casts its weight once for all chunks.
    """

    tokens: int
    softmax: Softmax = loss_and_gradient
    casts_once: Callable[[nn.Module], AbstractContextManager[None]] = lambda head: nullcontext()

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"ChunkedLoss.tokens is {self.tokens}; a chunk has at least 1 token")

    def of_weight(self, h_BSD: Tensor, w_VD: Tensor, labels_BS: Tensor) -> Tensor:
        """The summed cross entropy of `h w^T`."""

        def products(h: Tensor, labels: Tensor, dh: Tensor | None, dw: Tensor | None) -> Tensor:
            z = F.linear(h, w_VD)
            with torch.autocast(h.device.type, enabled=False):  # which z has heeded
                nats, dz = self.softmax(z, labels)
                w, x = w_VD.to(dz.dtype), h.to(dz.dtype)
                if dh is not None:
                    if dh.dtype == dz.dtype:
                        torch.mm(dz, w, out=dh)
                    else:
                        dh.copy_(torch.mm(dz, w))
                if dw is not None:
                    _add_product(dw, dz.t(), x)
            return nats

        return self._sum(h_BSD, w_VD, labels_BS, products)

    def of_head(self, head: nn.Linear, h_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        """The summed cross entropy of `head(h)`, by the forward and backward that the head's class has."""
        if super(HeadWithLoss, head).forward.__func__ is nn.Linear.forward:  # type: ignore[misc]
            return self.of_weight(h_BSD, head.weight, labels_BS)

        def products(h: Tensor, labels: Tensor, dh: Tensor | None, dw: Tensor | None) -> Tensor:
            wanted = dh is not None or dw is not None
            with torch.set_grad_enabled(wanted):
                leaf = h.detach().requires_grad_(dh is not None)
                z = super(HeadWithLoss, head).forward(leaf)  # type: ignore[misc]
            nats, dz = self.softmax(z.detach(), labels)
            inputs = ([] if dh is None else [leaf]) + ([] if dw is None else [head.weight])
            made: Iterator[Tensor] = iter(torch.autograd.grad(z, inputs, dz) if wanted else ())
            if dh is not None:
                dh.copy_(next(made))
            if dw is not None:
                dw.add_(next(made))
            return nats

        with self.casts_once(head):
            return self._sum(h_BSD, head.weight, labels_BS, products)

    def _sum(self, h_BSD: Tensor, w_VD: Tensor, labels_BS: Tensor, products: Callable[..., Tensor]) -> Tensor:
        grads = torch.is_grad_enabled()
        return _Loss.apply(h_BSD.flatten(0, -2), w_VD, labels_BS.flatten(), products, self.tokens, grads)


class HeadWithLoss(nn.Linear):
    """A linear layer that, called with labels, returns their summed cross entropy instead of logits."""

    chunked_loss: ChunkedLoss

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(input)
        return self.chunked_loss.of_head(self, input, labels)


def give_loss(head: nn.Linear, loss: ChunkedLoss) -> None:
    """Make `head`, without a bias, a `HeadWithLoss` of its own class, in place."""
    if head.bias is not None:
        raise ValueError("a chunked loss needs an output projection without a bias")
    kind = type(head)
    head.__class__ = type(f"{kind.__name__}WithLoss", (HeadWithLoss, kind), {})
    assert isinstance(head, HeadWithLoss)
    head.chunked_loss = loss
