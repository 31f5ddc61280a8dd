"""The smooth top-1 SVM loss against its printed definition."""

import pytest
import torch
import torch.nn.functional as F

from cytossl_core.losses import smooth_top1_svm
from tests.definitions.smooth_svm import topk

SCORES = torch.randn(7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
LABELS = torch.tensor([0, 4, 2, 2, 1, 3, 0])


@pytest.mark.parametrize(("alpha", "tau"), [(1.0, 1.0), (0.3, 2.0), (2.0, 0.25)])
def test_values_and_gradients_are_the_printed_equation(alpha: float, tau: float) -> None:
    scores = SCORES.clone().requires_grad_(True)
    ours = smooth_top1_svm(scores, LABELS, alpha, tau)
    pairs = zip(scores, LABELS.tolist(), strict=True)
    theirs = torch.stack([topk(row, label, 1, alpha, tau) for row, label in pairs])
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    factor = torch.arange(1.0, 8.0, dtype=torch.float64)
    own, other = (torch.autograd.grad((of * factor).sum(), scores)[0] for of in (ours, theirs))
    torch.testing.assert_close(own, other, atol=1e-12, rtol=1e-10)
    assert (ours >= 0).all()


def test_two_scores_by_hand() -> None:
    """Label 0, scores 2 and 1: ln(e^0 + e^(1 + 1 - 2)) = ln 2; label 1: ln(1 + e^(1 + 2 - 1))."""
    loss = smooth_top1_svm(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]))
    torch.testing.assert_close(loss, torch.tensor([0.6931472, 2.1269280]))


def test_no_margin_is_cross_entropy_and_no_temperature_the_hinge() -> None:
    entropy = F.cross_entropy(SCORES, LABELS, reduction="none")
    torch.testing.assert_close(smooth_top1_svm(SCORES, LABELS, alpha=0.0), entropy)
    hinge = F.multi_margin_loss  # a mean of hinges, so one wrong class at a time is compared
    pair, labels = SCORES[:, :2].contiguous(), LABELS % 2
    expected = 2 * hinge(pair, labels, reduction="none")
    torch.testing.assert_close(smooth_top1_svm(pair, labels, tau=1e-4), expected, atol=1e-3, rtol=0)


def test_large_scores_neither_overflow_nor_go_below_zero() -> None:
    scores = torch.tensor([[1e4, -1e4], [1e4, -1e4], [1e30, 1e30]], requires_grad=True)
    loss = smooth_top1_svm(scores, torch.tensor([0, 1, 1]))
    assert loss[0] == 0 and loss[1] == 20001
    loss.sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_the_authors_hard_maximum_lies_within_the_stated_bound() -> None:
    """Their rows: the two largest scores more than tau ln 1000 apart."""
    tau, alpha, classes = 0.5, 1.0, 5
    rows = torch.zeros(3, classes, dtype=torch.float64)
    rows[:, 1] = tau * torch.tensor(1000.0).log().double() + 1e-9
    labels = torch.tensor([1, 0, 4])
    hard = rows + alpha * (1 - F.one_hot(labels, classes)) - rows.gather(1, labels[:, None])
    gap = smooth_top1_svm(rows, labels, alpha, tau) - hard.amax(dim=1)
    bound = tau * torch.tensor(1 + (classes - 1) * 2.718281828459045 ** (alpha / tau) / 1000).log()
    assert (gap > 0).all() and (gap <= bound + 1e-9).all() and gap[0] > 0.99 * bound


def test_half_precision_is_computed_in_float32() -> None:
    scores = SCORES.to(torch.bfloat16)
    loss = smooth_top1_svm(scores, LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), smooth_top1_svm(scores.double(), LABELS))


def test_no_rows_have_no_loss() -> None:
    assert smooth_top1_svm(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1: it must be 0 or more"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"tau": 0.0}, "tau is 0.0: it must be above 0"),
    ],
)
def test_rejects_margins_and_temperatures_without_meaning(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smooth_top1_svm(SCORES, LABELS, **values)


@pytest.mark.parametrize("label", [-1, 5])
def test_rejects_a_label_that_is_no_class(label: int) -> None:
    with pytest.raises(ValueError, match="scores has 5 columns, so they must be 0 to 4"):
        smooth_top1_svm(SCORES[:2], torch.tensor([1, label]))
