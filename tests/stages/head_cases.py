"""Bags for the tests of heads, and what every head must keep to."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from stages.heads import Head, _training

DIM = 5
LENGTHS = (1, 2, 3, 7, 4, 13, 19)
Weight = dict[str, Tensor]


def training(epochs: int, learning_rate: float) -> _training.Training:
    """Settings under which a head of a few numbers learns within seconds."""
    values = {
        "epochs": epochs,
        "patience": epochs,
        "batch": 4,
        "learning_rate": learning_rate,
        "weight_decay": 1e-4,
        "betas": (0.9, 0.999),
        "optimizer": "adam",
        "schedule": "constant",
        "warmup_epochs": 0,
        "clip": 0.0,
        "balanced": False,
        "select": "loss",
        "standardise": True,
    }
    known = {field.name for field in dataclasses.fields(_training.Training)}
    return _training.Training(**{name: values[name] for name in known})


def weight_of(head: nn.Module) -> Weight:
    return dict(head.named_parameters()) | dict(head.named_buffers())


def spread_out(head: nn.Module) -> nn.Module:
    """Draw weights under which attention is far from even; `head`, with nothing dropped."""
    torch.manual_seed(3)
    for value in head.parameters():
        nn.init.normal_(value, std=0.7)
    head.standardise.mean += 0.3
    head.standardise.scale *= 1.7
    return head.eval()


def bags_of(lengths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(length, DIM, generator=draws, dtype=dtype) for length in lengths]


def padded(bags: list[Tensor], length: int, fill: float = 1e3) -> tuple[Tensor, Tensor]:
    """One tensor and its mask; padding holds what must not matter."""
    batch = torch.full((len(bags), length, DIM), fill, dtype=bags[0].dtype)
    mask = torch.zeros(len(bags), length, dtype=torch.bool)
    for row, bag in enumerate(bags):
        batch[row, : len(bag)], mask[row, : len(bag)] = bag, True
    return batch, mask


def check_loss(head: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    """Values and the gradients of every parameter are equal."""
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    names, values = zip(*head.named_parameters(), strict=True)
    every = [
        torch.autograd.grad(of, values, retain_graph=True, materialize_grads=True)
        for of in (ours, theirs)
    ]
    assert any(gradient.abs().sum() > 0 for gradient in every[0])
    for name, own, other in zip(names, *every, strict=True):
        torch.testing.assert_close(own, other, atol=1e-10, rtol=1e-9, msg=lambda m, n=name: n + m)


def check_padding(head: nn.Module, dtype: torch.dtype, tolerance: float) -> None:
    """Batched is single, padded is unpadded; attention sums to 1 and is 0 on padding."""
    head, bags = head.to(dtype), bags_of((*LENGTHS, 101), dtype)
    for fill in (1e3, -1e3):
        logits, weights = head(*padded(bags, 113, fill))
        for row, bag in enumerate(bags):
            alone, own = head(bag[None], torch.ones(1, len(bag), dtype=torch.bool))
            torch.testing.assert_close(logits[row], alone[0], atol=tolerance, rtol=0)
            torch.testing.assert_close(weights[row, : len(bag)], own[0], atol=tolerance, rtol=0)
            assert weights[row, len(bag) :].abs().sum() == 0
        one = torch.ones(len(bags), dtype=dtype)
        torch.testing.assert_close(weights.sum(dim=1), one, atol=tolerance, rtol=0)
        assert (weights >= 0).all()


def check_gradient(head: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Padding gets no gradient, whatever it holds, and every bag gets one."""
    batch, mask = padded(bags_of(LENGTHS), 23)
    batch.requires_grad_(True)
    loss(batch, mask).backward()
    assert torch.isfinite(batch.grad).all() and batch.grad[~mask].abs().sum() == 0
    assert (batch.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert all(torch.isfinite(value.grad).all() for value in head.parameters())


def bags_with_a_key(count: int, seed: int, classes: int = 2) -> tuple[list, np.ndarray, list]:
    """Noise, and in bags of class c > 0 one instance that stands out in dimension c; its place."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    bags, places = [], []
    for label in labels:
        bag = rng.normal(size=(rng.integers(11, 24), DIM)).astype(np.float32)
        place = int(rng.integers(len(bag)))
        if label:
            bag[place, label] += 6.0
        bags.append(bag)
        places.append(place if label else -1)
    return bags, labels, places


def check_learning(head: Head, classes: int, pointed: float) -> None:
    """A trained head tells test bags apart, and its attention points at what decides."""
    train, val, test = (bags_with_a_key(60, seed, classes) for seed in (1, 2, 3))
    head.fit(train[0], train[1], val[0], val[1], seed=5)
    probability, attention = head.predict(test[0])
    np.testing.assert_allclose(probability.sum(axis=1), 1)
    np.testing.assert_allclose([weights.sum() for weights in attention], 1, atol=1e-6)
    for c in range(1, classes):
        assert roc_auc_score(test[1] == c, probability[:, c]) > 0.95
    found = [w.argmax() == place for w, place in zip(attention, test[2], strict=True) if place >= 0]
    assert np.mean(found) > pointed
