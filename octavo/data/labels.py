"""Inputs and labels: `labels[b, s]` is the token that follows `tokens[b, s]`.

What follows a document's end is another document's first token. The text before cannot tell it, so its loss
is noise to a model whose attention stays within documents: `document_end` leaves it out.
"""

from torch import Tensor

IGNORED = -100  # the label that cross entropy ignores


def split_samples(samples: Tensor, document_end: int | None) -> tuple[Tensor, Tensor]:
    """Tokens and labels, each a contiguous [B, S], of `samples` [B, S + 1].

    Labels that follow the id `document_end` are IGNORED; None ignores none.
    """
    tokens_BS, labels_BS = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
    if document_end is not None:
        labels_BS = labels_BS.masked_fill(tokens_BS == document_end, IGNORED)
    return tokens_BS, labels_BS
