"""iBOT's loss against its definition."""

import pytest
import torch

from cytossl_core.losses import IBOTLoss
from tests.definitions import ibot as definition

COUNTS, PROTOTYPES = (3, 0, 1, 5), 7
IMAGE = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))


def outputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, sum(COUNTS), PROTOTYPES, generator=generator, dtype=torch.float64).to(
        dtype
    )


def test_matches_definition_in_value_gradient_and_center():
    student, teacher = outputs()
    ibot = IBOTLoss(PROTOTYPES, 0.2, 0.8).double()
    center = torch.zeros(PROTOTYPES, dtype=torch.float64)
    for step in range(3):
        ours, plain = (student.clone().requires_grad_() for _ in range(2))
        got = ibot(ours, teacher + step, IMAGE, len(COUNTS), 0.07)
        split = [list(side.split(COUNTS)) for side in (plain, teacher + step)]
        expected = definition.loss(*split, center, 0.2, 0.07)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(got, ours), torch.autograd.grad(expected, plain)
        )
        center = 0.8 * center + 0.2 * (teacher + step).mean(0)
        torch.testing.assert_close(ibot.center, center, rtol=1e-12, atol=1e-15)


def test_a_batch_without_masks_costs_nothing_and_moves_nothing():
    ibot = IBOTLoss(PROTOTYPES)
    ibot.center.fill_(0.5)
    student = torch.zeros(0, PROTOTYPES, requires_grad=True)
    loss = ibot(student, student.detach(), torch.zeros(0, dtype=torch.int64), 4, 0.04)
    loss.backward()
    assert loss.item() == 0 and torch.equal(ibot.center, torch.full((PROTOTYPES,), 0.5))


def test_computes_in_float32_inside_autocast():
    student, teacher = outputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = IBOTLoss(PROTOTYPES)(student, teacher, IMAGE, len(COUNTS), 0.04)
    expected = IBOTLoss(PROTOTYPES)(student.float(), teacher.float(), IMAGE, len(COUNTS), 0.04)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


@pytest.mark.parametrize(("temperature", "images"), [(0.0, 4), (float("nan"), 4), (0.04, 0)])
def test_rejects_what_nothing_can_be_divided_by(temperature, images):
    student, teacher = outputs()
    with pytest.raises(ValueError, match="they must be above 0"):
        IBOTLoss(PROTOTYPES)(student, teacher, IMAGE, images, temperature)
