"""Chunked cross entropy: the output projection and its loss by chunks of tokens, so that the full logits are
never materialised.

    for each chunk of tokens c:   z = h_c . w^T;   loss += sum(logsumexp(z) - z[label]);
                                  dz = softmax(z) - onehot(label);   dh_c = dz . w;   dw += dz^T . h_c

For 8,192 tokens and a vocabulary of 128,256, float32 logits and their gradient take 8.4 GB; chunks of 1,024
tokens take an eighth of that. The gradients are computed in forward, while a chunk's logits exist. Computing
them in backward would repeat the product z (2 % of a Llama 3 8B step) and would save only the projection's
gradient (V x D) between the loss and the start of backward. Backward multiplies both by the loss's gradient.

The loss and dw are accumulated over chunks in float32, even where parameters are bfloat16 (4 V D bytes while
the loss is computed). In float32 the result differs from the plain loss only by the order of sums, about 1e-7
relative. In bfloat16 the gradients are rounded before they are multiplied by the loss's scale; that is exact
where the scale is a power of two, as 1 / (tokens in the global batch) usually is. Where a float8 scale covers
many tokens, each chunk has its own scale, as a smaller microbatch would.

An output projection that is a module is called with the labels as second argument, so that FSDP2 gathers its
parameters. `attach_loss` makes the module accept them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label that `F.cross_entropy` ignores

Softmax = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def loss_and_gradient(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross entropy, a float32 scalar, and its gradient [C, V] in the logits' dtype."""
    z = logits_CV.float()
    counted = labels_C != IGNORED
    label = labels_C.where(counted, 0).unsqueeze(1)
    log_sum = z.logsumexp(dim=1, keepdim=True)
    nats = (log_sum - z.gather(1, label)).squeeze(1).where(counted, 0.0).sum()
    dz = (z - log_sum).exp().scatter_add(1, label, z.new_full((), -1.0).expand_as(label))
    return nats, dz.where(counted.unsqueeze(1), 0.0).to(logits_CV.dtype)


def _addmm_float32(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a . b`, accumulated in float32 for any dtype of a and b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":  # only CUDA adds a product of narrower operands to a float32 sum
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


class _ChunkedLossFunction(torch.autograd.Function):
    """Scalar loss of `h[T, D]`, `w[V, D]` and `labels[T]`. Forward computes the gradients."""

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
            total += products(h[chunk], labels[chunk], None if dh is None else dh[chunk], dw)
        ctx.save_for_backward(dh, None if dw is None else dw.to(w.dtype))
        ctx.scaled = False
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.scaled:
            raise RuntimeError("a chunked loss can be differentiated once: its gradients are scaled in place")
        ctx.scaled = True
        dh, dw = (None if saved is None else saved.mul_(grads[0]) for saved in ctx.saved_tensors)
        return dh, dw, None, None, None, None


@dataclass(frozen=True)
class ChunkedLoss:
    """Settings of the chunked loss.

    Attributes:
        tokens: tokens per chunk.
        softmax: `loss_and_gradient`, or its compiled form.
        casts_once: context manager in which a head casts its weight once for all chunks.
    """

    tokens: int
    softmax: Softmax = loss_and_gradient
    casts_once: Callable[[nn.Module], AbstractContextManager[None]] = lambda head: nullcontext()

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"ChunkedLoss.tokens is {self.tokens}; a chunk has at least 1 token")

    def from_weight(self, h_BSD: Tensor, w_VD: Tensor, labels_BS: Tensor) -> Tensor:
        """The summed cross entropy of the logits `h w^T`."""

        def products(h: Tensor, labels: Tensor, dh: Tensor | None, dw: Tensor | None) -> Tensor:
            z = F.linear(h, w_VD)
            with torch.autocast(h.device.type, enabled=False):  # z already has autocast's dtype
                nats, dz = self.softmax(z, labels)
                w, x = w_VD.to(dz.dtype), h.to(dz.dtype)
                if dh is not None:
                    if dh.dtype == dz.dtype:
                        torch.mm(dz, w, out=dh)
                    else:
                        dh.copy_(torch.mm(dz, w))
                if dw is not None:
                    _addmm_float32(dw, dz.t(), x)
            return nats

        return self._sum(h_BSD, w_VD, labels_BS, products)

    def from_head(self, head: nn.Linear, h_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        """The summed cross entropy of `head(h)`, computed by the forward and backward of the head's class."""
        if super(HeadWithLoss, head).forward.__func__ is nn.Linear.forward:  # type: ignore[misc]
            return self.from_weight(h_BSD, head.weight, labels_BS)

        def products(h: Tensor, labels: Tensor, dh: Tensor | None, dw: Tensor | None) -> Tensor:
            needs_grad = dh is not None or dw is not None
            with torch.set_grad_enabled(needs_grad):
                leaf = h.detach().requires_grad_(dh is not None)
                z = super(HeadWithLoss, head).forward(leaf)  # type: ignore[misc]
            nats, dz = self.softmax(z.detach(), labels)
            inputs = ([] if dh is None else [leaf]) + ([] if dw is None else [head.weight])
            grads: Iterator[Tensor] = iter(torch.autograd.grad(z, inputs, dz) if needs_grad else ())
            if dh is not None:
                dh.copy_(next(grads))
            if dw is not None:
                dw.add_(next(grads))
            return nats

        with self.casts_once(head):
            return self._sum(h_BSD, head.weight, labels_BS, products)

    def _sum(self, h_BSD: Tensor, w_VD: Tensor, labels_BS: Tensor, products: Callable[..., Tensor]) -> Tensor:
        grads = torch.is_grad_enabled()
        return _ChunkedLossFunction.apply(
            h_BSD.flatten(0, -2), w_VD, labels_BS.flatten(), products, self.tokens, grads
        )


class HeadWithLoss(nn.Linear):
    """A linear layer that returns the summed cross entropy instead of logits when called with labels."""

    chunked_loss: ChunkedLoss

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(input)
        return self.chunked_loss.from_head(self, input, labels)


def attach_loss(head: nn.Linear, loss: ChunkedLoss) -> None:
    """Turn `head`, without a bias, into a `HeadWithLoss` in place; it stays an instance of its class."""
    if head.bias is not None:
        raise ValueError("a chunked loss needs an output projection without a bias")
    head_class = type(head)
    head.__class__ = type(f"{head_class.__name__}WithLoss", (HeadWithLoss, head_class), {})
    assert isinstance(head, HeadWithLoss)
    head.chunked_loss = loss
