"""VPU's loss against its printed definition, where logarithms are far from 0, and bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

from cytossl_core.losses import mixed_log_target, vpu_loss
from tests.definitions import vpu as definition


def log_phi(count: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.logsigmoid(spread * torch.randn(count, generator=draw, dtype=torch.float64))


def gradients(loss, inputs) -> list[torch.Tensor]:
    inputs = [one.clone().requires_grad_() for one in inputs]
    parts = loss(*inputs)
    return [*(part.detach() for part in parts), *torch.autograd.grad(sum(parts), inputs)]


@pytest.mark.parametrize(("positives", "others"), [(1, 1), (3, 3), (2, 7), (11, 5)])
@pytest.mark.parametrize("share", [0.0, 1e-12, 0.3, 1 - 1e-12, 1.0])
def test_matches_the_definition_in_value_and_gradients(positives, others, share):
    def ours(positive, unlabeled, mixed):
        return vpu_loss(positive, unlabeled, mixed, mixed_log_target(unlabeled, share), 0.03)

    def plain(positive, unlabeled, mixed):
        phi = positive.exp(), unlabeled.exp(), mixed.exp()
        return definition.variational(*phi[:2]), 0.03 * definition.regulariser(*phi[1:], share)

    inputs = log_phi(positives, 0), log_phi(others, 1), log_phi(others, 2)
    for one, other in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_extreme_probabilities_leave_finite_numbers(dtype):
    certain = torch.tensor([0.0, -1e-8, -30000.0], dtype=dtype, requires_grad=True)
    parts = vpu_loss(certain, certain, certain, mixed_log_target(certain, 0.4), 1.0)
    (slope,) = torch.autograd.grad(sum(parts), certain)
    assert all(part.isfinite() for part in parts) and slope.isfinite().all()
    assert all(part.dtype == torch.promote_types(dtype, torch.float32) for part in parts)
    assert parts[0].item() == pytest.approx(math.log(2 / 3) + 10000, rel=1e-2)


def test_equal_samples_leave_no_loss_where_the_mixture_keeps_its_word():
    same = torch.full((4,), -0.7, dtype=torch.float64)
    variational, regulariser = vpu_loss(same, same, same, mixed_log_target(same, 1.0), 0.3)
    assert variational.item() == pytest.approx(0, abs=1e-15) and regulariser.item() == 0
    assert mixed_log_target(same, 0.0).tolist() == [0.0] * 4  # a positive alone: Phi is 1


def test_half_precision_is_computed_in_single():
    values = log_phi(9, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = vpu_loss(values, values, values, mixed_log_target(values, 0.3), 0.1)
    wide = values.float()
    expected = vpu_loss(wide, wide, wide, mixed_log_target(wide, 0.3), 0.1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_rejects_samples_that_are_not_there(empty):
    inputs = [log_phi(3, at) for at in range(3)]
    inputs[empty] = inputs[empty][:0]
    with pytest.raises(ValueError, match=r"is \[0\]: it must be \[sample\], of one or more"):
        vpu_loss(*inputs, inputs[2], 0.03)


def test_rejects_shapes_and_numbers_that_mean_nothing():
    three, four = log_phi(3, 0), log_phi(4, 0)
    with pytest.raises(ValueError, match=r"mixed_target is \[4\], log_phi_mixed \[3\]"):
        vpu_loss(three, three, three, four, 0.03)
    with pytest.raises(ValueError, match=r"weight -0.1: shapes must be the same, the weight 0"):
        vpu_loss(three, three, three, three, -0.1)
    with pytest.raises(ValueError, match="share is 1.5: it must be from 0 to 1"):
        mixed_log_target(three, 1.5)
