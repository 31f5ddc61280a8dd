"""CLAM-SB: loss and gradients against the definition, small bags, padding, learning."""

import pytest
import torch

from stages.heads import _training, clam_sb
from stages.heads._gated import GatedAttention
from tests.definitions import clam_sb as definition
from tests.stages import head_cases
from tests.stages.head_cases import LENGTHS

TRAINING = head_cases.training(epochs=40, learning_rate=2e-3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def params(training: _training.Training | None = None, **other) -> clam_sb.Params:
    values = {
        "width": 11,
        "attention_width": 7,
        "dropout": 0.0,
        "instance_loss": "svm",
        "k_sample": 3,
        "bag_weight": 0.7,
        "subtyping": False,
    }
    return clam_sb.Params(training=training, **(values | other))


def a_head(classes: int = 3, **other) -> clam_sb.ClamSB:
    return head_cases.spread_out(clam_sb.build(head_cases.DIM, classes, params(**other))).double()


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("kind", clam_sb.INSTANCE_LOSSES)
@pytest.mark.parametrize("classes", [2, 3])
def test_the_loss_of_a_batch_is_the_definition_bag_by_bag(classes, kind, subtyping) -> None:
    head = a_head(classes, instance_loss=kind, subtyping=subtyping)
    bags, labels = head_cases.bags_of(LENGTHS), torch.arange(len(LENGTHS)) % classes
    ours = head.loss(*head_cases.padded(bags, 23), labels)
    weight = head_cases.weight_of(head)
    theirs = [
        definition.loss(weight, bag, int(label), classes, 3, kind, subtyping, 0.7)
        for bag, label in zip(bags, labels, strict=True)
    ]
    head_cases.check_loss(head, ours, sum(theirs) / len(theirs))


def test_logits_and_attention_are_the_definition() -> None:
    head, bags = a_head(), head_cases.bags_of(LENGTHS)
    logits, attention = head(*head_cases.padded(bags, 23))
    for row, bag in enumerate(bags):
        expected, shares, _ = definition.read(head_cases.weight_of(head), bag)
        torch.testing.assert_close(logits[row], expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(
            attention[row, : len(bag)], torch.stack(shares), atol=1e-10, rtol=0
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_padding_and_batching_change_nothing(dtype: torch.dtype, tolerance: float) -> None:
    head_cases.check_padding(a_head(), dtype, tolerance)


@pytest.mark.parametrize("subtyping", [False, True])
def test_gradients_do_not_reach_padding(subtyping: bool) -> None:
    head, labels = a_head(subtyping=subtyping), torch.arange(len(LENGTHS)) % 3
    head_cases.check_gradient(head, lambda bag, mask: head.loss(bag, mask, labels))


def test_a_bag_of_one_trains_the_bag_classifier_alone() -> None:
    head = a_head(bag_weight=0.0)
    one = head_cases.padded(head_cases.bags_of((1,)), 4)
    assert head.loss(*one, torch.tensor([1])) == 0
    with_others = a_head(bag_weight=0.0, subtyping=True)
    assert with_others.loss(*one, torch.tensor([1])) > 0  # it is of no other class


def test_the_middle_of_a_bag_is_not_labelled() -> None:
    """The instance loss sees k highest and k lowest instances, and none between them."""
    head, (bag,) = a_head(bag_weight=0.0), head_cases.bags_of((9,))
    mask = torch.ones(1, 9, dtype=torch.bool)
    order = head(bag[None], mask)[1][0].argsort()
    reached = bag.clone()[None].requires_grad_(True)
    head.loss(reached, mask, torch.tensor([0])).backward()
    moved = reached.grad[0].abs().sum(dim=1) > 0
    assert moved[order].tolist() == [True] * 3 + [False] * 3 + [True] * 3


def test_dropout_is_of_the_projection_and_a_quarter_in_the_attention() -> None:
    rates = [
        [
            part.p
            for part in clam_sb.build(5, 2, params(dropout=share)).modules()
            if isinstance(part, torch.nn.Dropout)
        ]
        for share in (0.0, 0.4)
    ]
    assert rates == [[0.0, 0.0], [0.4, 0.25]]
    head, mask = a_head(dropout=0.4).train(), torch.ones(1, 7, dtype=torch.bool)
    bag = head_cases.bags_of((7,))[0][None]
    assert not torch.equal(head(bag, mask)[0], head(bag, mask)[0])
    assert torch.equal(head.eval()(bag, mask)[0], head(bag, mask)[0])


def test_both_branches_of_the_attention_drop_on_their_own() -> None:
    attend = GatedAttention(2, 1, dropout=0.25)
    for part in (attend.tanh, attend.gate):
        torch.nn.init.constant_(part.bias, 50.0)  # both branches are 1 where they are not dropped
    torch.nn.init.ones_(attend.out.weight)
    torch.nn.init.zeros_(attend.out.bias)
    torch.manual_seed(1)
    score = attend(torch.zeros(1, 20_000, 2))
    assert abs((score > 0).double().mean().item() - 0.75**2) < 0.015
    torch.testing.assert_close(score.max(), torch.tensor(1 / 0.75**2))


@pytest.mark.parametrize(
    ("kind", "subtyping", "classes"), [("svm", False, 2), ("ce", False, 2), ("svm", True, 3)]
)
def test_learns_the_instance_that_decides_and_points_at_it(kind, subtyping, classes) -> None:
    settings = params(
        TRAINING,
        width=31,
        attention_width=13,
        dropout=0.25,
        instance_loss=kind,
        subtyping=subtyping,
    )
    head = clam_sb.build(head_cases.DIM, classes, settings)
    head_cases.check_learning(head, classes, pointed=0.9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"instance_loss": "hinge"}, "instance_loss is 'hinge': it must be one of svm, ce"),
        ({"k_sample": 0}, "k_sample is 0: it must be 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0: it must be 0 or more, below 1"),
        ({"bag_weight": 1.5}, "bag_weight is 1.5: it must be from 0 to 1"),
    ],
)
def test_rejects_values_outside_their_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params(**values)
