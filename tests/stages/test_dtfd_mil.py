"""DTFD-MIL: both tiers against the definition, their apartness, splits, padding, learning."""

import numpy as np
import pytest
import torch

from stages.heads import _groups, _training, dtfd_mil
from tests.definitions import dtfd_mil as definition
from tests.stages import head_cases
from tests.stages.head_cases import LENGTHS

TRAINING = head_cases.training(epochs=40, learning_rate=2e-3)
DISTILLATIONS = dtfd_mil.DISTILLATIONS


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def params(training: _training.Training | None = None, **other) -> dtfd_mil.Params:
    values = {
        "width": 11,
        "attention_width": 7,
        "distillation": "AFS",
        "groups": 4,
        "inference_splits": 3,
    }
    return dtfd_mil.Params(training=training, **(values | other))


def a_head(distillation: str = "AFS", classes: int = 2, **other) -> dtfd_mil.DTFDMIL:
    settings = params(distillation=distillation, **other)
    return head_cases.spread_out(dtfd_mil.build(head_cases.DIM, classes, settings)).double()


def groups_of(members: torch.Tensor) -> list[list[int]]:
    """The instances of each group of one bag, without groups that are empty."""
    return [row.nonzero().flatten().tolist() for row in members if row.any()]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("distillation", DISTILLATIONS)
def test_losses_of_a_batch_are_the_definition_bag_by_bag(distillation: str, classes: int) -> None:
    head, bags = a_head(distillation, classes), head_cases.bags_of(LENGTHS)
    labels, (batch, mask) = torch.arange(len(bags)) % classes, head_cases.padded(bags, 23)
    members = _groups.drawn(mask, 4)
    ours = head.tier_losses(batch, mask, labels, members)
    theirs = [
        definition.losses(
            head_cases.weight_of(head), bag, int(label), groups_of(parts), distillation
        )
        for bag, label, parts in zip(bags, labels, members, strict=True)
    ]
    for own, other in zip(ours, zip(*theirs, strict=True), strict=True):
        head_cases.check_loss(head, own, sum(other) / len(other))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("distillation", DISTILLATIONS)
def test_probability_and_attention_are_the_definition(distillation: str, classes: int) -> None:
    head, bags = a_head(distillation, classes), head_cases.bags_of(LENGTHS)
    batch, mask = head_cases.padded(bags, 23)
    logits, attention = head(batch, mask)
    members = _groups.seeded(mask, 4, 3).unflatten(1, (3, 4))
    for row, bag in enumerate(bags):
        splits = [groups_of(split) for split in members[row]]
        expected, shares = definition.probability(
            head_cases.weight_of(head), bag, splits, distillation
        )
        torch.testing.assert_close(logits[row].exp(), expected, atol=1e-10, rtol=0)
        np.testing.assert_allclose(attention[row, : len(bag)].detach(), shares, atol=1e-10)


@pytest.mark.parametrize("distillation", DISTILLATIONS)
def test_neither_tier_learns_from_the_others_loss(distillation: str) -> None:
    head, bags = a_head(distillation), head_cases.bags_of(LENGTHS)
    batch, mask = head_cases.padded(bags, 23)
    labels = torch.arange(len(bags)) % 2
    losses = head.tier_losses(batch, mask, labels, _groups.drawn(mask, 4))
    tiers = head.parameter_groups()
    for at, loss in enumerate(losses):
        for tier, values in enumerate(tiers):
            found = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
            if at == tier:
                assert sum(gradient.abs().sum() for gradient in found) > 0
            else:
                assert all(gradient is None for gradient in found)  # not even a 0


def test_the_tiers_share_no_parameter_and_leave_none_out() -> None:
    head = a_head()
    first, second = (set(map(id, group)) for group in head.parameter_groups())
    assert not first & second and first | second == set(map(id, head.parameters()))


@pytest.mark.parametrize("distillation", DISTILLATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_padding_and_batching_change_nothing(distillation, dtype, tolerance) -> None:
    head_cases.check_padding(a_head(distillation), dtype, tolerance)


@pytest.mark.parametrize("distillation", DISTILLATIONS)
def test_gradients_do_not_reach_padding(distillation: str) -> None:
    head, labels = a_head(distillation), torch.arange(len(LENGTHS)) % 2
    head_cases.check_gradient(head, lambda bag, mask: head.loss(bag, mask, labels))


def test_of_three_classes_each_group_ranks_by_the_class_that_it_predicts() -> None:
    head, (bag,) = a_head("MaxMinS", 3), head_cases.bags_of((40,))
    bag, mask, label = 4 * bag, torch.ones(1, 40, dtype=torch.bool), torch.tensor([1])
    members = _groups.seeded(mask, 8, 1)
    weight, groups = head_cases.weight_of(head), groups_of(members[0])
    logits, _ = definition.first_tier(weight, bag, groups, "MaxMinS")
    assert len({int(of_group.argmax()) for of_group in logits}) > 1
    ours = head.tier_losses(bag[None], mask, label, members)[1]
    torch.testing.assert_close(ours, definition.losses(weight, bag, 1, groups, "MaxMinS")[1])


def test_inference_draws_nothing_and_training_draws_anew() -> None:
    head, (bag,) = a_head(), head_cases.bags_of((13,))
    mask, label = torch.ones(1, 13, dtype=torch.bool), torch.tensor([1])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = head(bag[None], mask)[0], head.train()(bag[None], mask)[0]
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    losses = [head.loss(bag[None], mask, label).item() for _ in range(3)]
    assert len(set(losses)) == 3
    torch.manual_seed(5)
    assert head.loss(bag[None], mask, label).item() == losses[0]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 11])
def test_groups_share_out_every_instance_evenly(length: int) -> None:
    mask = torch.arange(17) < torch.tensor([length, 17])[:, None]
    mask = mask[
        :, torch.tensor([0, 16, 3, 1, 9, 10, 2, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15])
    ]  # holes
    many = _groups.seeded(mask, 4, 5).unflatten(1, (5, 4))
    for members in (*many.unbind(1), _groups.drawn(mask, 4)):
        assert torch.equal(members.sum(dim=1), mask.long())  # each in one group, padding in none
        sizes = members.sum(dim=2)
        filled = min(length, 4)
        assert sizes[0, filled:].sum() == 0
        assert sizes[0, :filled].max() - sizes[0, :filled].min() <= 1
    assert length < 4 or not torch.equal(many[0, 0], many[0, 1])


def test_every_instance_is_as_likely_in_every_group() -> None:
    mask = torch.ones(4000, 6, dtype=torch.bool)
    torch.manual_seed(1)
    shares = _groups.drawn(mask, 3).double().mean(dim=0)
    assert (shares - 1 / 3).abs().max() < 0.03


def test_a_mask_may_have_holes() -> None:
    head, (bag,) = a_head(), head_cases.bags_of((7,))
    mask = torch.tensor([[True, False, True, True, False, False, True]])
    logits, weights = head(bag[None], mask)
    alone, own = head(bag[None][:, mask[0]], torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(logits, alone)
    torch.testing.assert_close(weights[mask], own[0])


@pytest.mark.parametrize(
    ("distillation", "classes"), [*((name, 2) for name in DISTILLATIONS), ("AFS", 3), ("MaxS", 3)]
)
def test_learns_the_instance_that_decides_and_points_at_it(distillation, classes) -> None:
    settings = params(TRAINING, width=31, attention_width=13, distillation=distillation)
    head = dtfd_mil.build(head_cases.DIM, classes, settings)
    head_cases.check_learning(head, classes, pointed=0.8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distillation": "max"}, "distillation is 'max': it must be one of AFS, MaxS"),
        ({"groups": 0}, "groups is 0: it must be 1 or more"),
        ({"inference_splits": 0}, "inference_splits is 0: it must be 1 or more"),
    ],
)
def test_rejects_values_outside_their_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params(**values)
