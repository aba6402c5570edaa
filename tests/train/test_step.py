"""The loss of a step is the mean over the labels that count, however they are divided into microbatches."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from octavo.data.labels import split_samples
from octavo.train.step import TrainStep

VOCABULARY, END = 7, 3
WORLD = SimpleNamespace(loss_parallel=False, sum=lambda values: values)


@pytest.mark.parametrize("document_end", [None, END])
def test_the_loss_is_the_mean_over_all_labels_that_count(document_end):
    torch.manual_seed(0)
    model = torch.nn.Embedding(VOCABULARY, VOCABULARY)
    samples = torch.randint(VOCABULARY, (6, 9))
    samples[:2] = END  # so that microbatches differ in what counts
    tokens, labels = split_samples(samples, document_end)
    want = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    (gradient,) = torch.autograd.grad(want, model.weight)
    step = TrainStep(
        model,
        WORLD,
        torch.device("cpu"),
        microbatches=3,
        global_tokens=labels.numel(),
        counts_labels=document_end is not None,
    )
    loss = step.gradients(zip(tokens.split(2), labels.split(2), strict=True))
    assert loss == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(model.weight.grad, gradient)


def test_a_step_without_a_label_that_counts_has_no_loss():
    model = torch.nn.Embedding(VOCABULARY, VOCABULARY)
    pair = split_samples(torch.full((2, 9), END), END)
    step = TrainStep(model, WORLD, torch.device("cpu"), microbatches=1, global_tokens=16, counts_labels=True)
    assert step.gradients([pair]) == 0
    assert not model.weight.grad.any()
