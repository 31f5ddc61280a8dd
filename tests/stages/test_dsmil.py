"""DSMIL: both streams against the definition, critical instances, padding, learning."""

import pytest
import torch

from stages.heads import _training, dsmil
from tests.definitions import dsmil as definition
from tests.stages import head_cases
from tests.stages.head_cases import LENGTHS

TRAINING = head_cases.training(epochs=60, learning_rate=3e-3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(classes: int, training: _training.Training | None = None) -> dsmil.DSMIL:
    return dsmil.build(head_cases.DIM, classes, dsmil.Params(query_width=7, training=training))


def a_head(classes: int) -> dsmil.DSMIL:
    return head_cases.spread_out(build(classes)).double()


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_loss_of_a_batch_is_the_definition_bag_by_bag(classes: int) -> None:
    head, bags = a_head(classes), head_cases.bags_of(LENGTHS)
    labels = torch.arange(len(LENGTHS)) % classes
    ours = head.loss(*head_cases.padded(bags, 23), labels)
    theirs = [
        definition.loss(head_cases.weight_of(head), bag, int(label), classes)
        for bag, label in zip(bags, labels, strict=True)
    ]
    head_cases.check_loss(head, ours, sum(theirs) / len(theirs))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_probability_and_attention_are_the_definition(classes: int) -> None:
    head, bags = a_head(classes), head_cases.bags_of(LENGTHS)
    logits, attention = head(*head_cases.padded(bags, 23))
    for row, bag in enumerate(bags):
        expected, shares = definition.probability(head_cases.weight_of(head), bag, classes)
        torch.testing.assert_close(logits[row].softmax(dim=0), expected, atol=1e-10, rtol=0)
        own = attention[row, : len(bag)]
        torch.testing.assert_close(own, torch.stack(shares), atol=1e-10, rtol=0)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_padding_and_batching_change_nothing(classes, dtype, tolerance) -> None:
    head_cases.check_padding(a_head(classes), dtype, tolerance)


def test_padding_is_never_critical() -> None:
    """Real instances score far below what padding of any kind would."""
    head = a_head(3)
    with torch.no_grad():
        head.classify_instance.bias -= 1e4
    bags, labels = head_cases.bags_of((3, 8)), torch.tensor([0, 2])
    wanted = [
        head.loss(bag[None], torch.ones(1, len(bag), dtype=torch.bool), label[None])
        for bag, label in zip(bags, labels, strict=True)
    ]
    for fill in (0.0, 1e6, -1e6):
        together = head.loss(*head_cases.padded(bags, 11, fill), labels)
        torch.testing.assert_close(together, sum(wanted) / 2)


@pytest.mark.parametrize("classes", [2, 3])
def test_gradients_do_not_reach_padding(classes: int) -> None:
    head, labels = a_head(classes), torch.arange(len(LENGTHS)) % classes
    head_cases.check_gradient(head, lambda bag, mask: head.loss(bag, mask, labels))


def test_the_authors_convolution_is_this_linear_layer() -> None:
    head = a_head(3)
    convolution = torch.nn.Conv1d(3, 3, head_cases.DIM).double()
    with torch.no_grad():
        convolution.weight.copy_(head.classify.weight.reshape(convolution.weight.shape))
        convolution.bias.copy_(head.classify.bias)
    vectors = torch.randn(4, 3, head_cases.DIM, dtype=torch.float64)
    torch.testing.assert_close(head.classify(vectors.flatten(1)), convolution(vectors)[:, :, 0])


def test_weights_start_orthogonal_after_a_fit_too() -> None:
    head = build(3, head_cases.training(epochs=1, learning_rate=1e-12))
    train = head_cases.bags_with_a_key(6, 1, 3)
    head.fit(train[0], train[1], train[0], train[1], seed=2)
    for module in (head.query[0], head.query[2], head.classify, head.classify_instance):
        weight = module.weight if len(module.weight) <= module.weight.shape[1] else module.weight.T
        torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), atol=1e-5, rtol=0)
        assert module.bias.abs().max() < 1e-6


@pytest.mark.parametrize("classes", [2, 3])
def test_learns_the_instance_that_decides_and_points_at_it(classes: int) -> None:
    head_cases.check_learning(build(classes, TRAINING), classes, pointed=0.9)


def test_rejects_queries_without_numbers() -> None:
    with pytest.raises(ValueError, match="query_width is 0: it must be 1 or more"):
        dsmil.Params(query_width=0, training=TRAINING)
