"""TransMIL: both attentions against their definitions, squares, batches, learning."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from stages.heads import _nystrom, _training, transmil
from tests.definitions import nystrom as nystrom_definition
from tests.definitions import transmil as definition
from tests.stages import head_cases

DIM = 5
LENGTHS = (1, 2, 3, 4, 7, 11, 13)
ATTENTION = transmil.ATTENTION

TRAINING = dataclasses.replace(head_cases.training(25, 3e-3), batch=8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def a_head(attention: str = "exact", training: _training.Training | None = None, **other):
    torch.manual_seed(3)
    values = {"width": 6, "heads": 2, "landmarks": 5, "pinv_iterations": 6} | other
    params = transmil.Params(
        attention=attention, residual_tokens=5, dropout=0.1, training=training, **values
    )
    head = transmil.build(DIM, 3, params)
    for value in head.parameters():
        torch.nn.init.normal_(value, std=0.5)  # or attention is nearly even
    return head


def bags_of(lengths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(length, DIM, generator=draws, dtype=dtype) for length in lengths]


def padded(bags: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = torch.full((len(bags), length, DIM), 1e3, dtype=bags[0].dtype)  # must not matter
    mask = torch.zeros(len(bags), length, dtype=torch.bool)
    for row, bag in enumerate(bags):
        batch[row, : len(bag)], mask[row, : len(bag)] = bag, True
    return batch, mask


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_batch_is_the_definition_bag_by_bag(attention: str) -> None:
    head = a_head(attention).double().eval()
    bags = bags_of(LENGTHS)
    logits, found = head(*padded(bags, 17))
    weight = dict(head.named_parameters()) | dict(head.named_buffers())
    expected = [definition.transmil(weight, bag, 2, attention, 5, 6) for bag in bags]
    wanted = torch.stack([of_bag for of_bag, _ in expected])
    torch.testing.assert_close(logits, wanted, atol=1e-9, rtol=1e-9)
    for row, (_, shares) in enumerate(expected):
        np.testing.assert_allclose(found[row, : len(shares)], shares, atol=1e-9)
        assert found[row, len(shares) :].abs().sum() == 0
    names, values = zip(*head.named_parameters(), strict=True)
    factor = torch.arange(1.0, 4.0, dtype=torch.float64)
    ours = torch.autograd.grad((logits * factor).sum(), values)
    theirs = torch.autograd.grad((wanted * factor).sum(), values)
    for name, own, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-8, rtol=1e-7, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_and_batching_change_nothing(attention: str) -> None:
    head = a_head(attention).eval()
    bags = bags_of((*LENGTHS, 101), torch.float32)
    logits, weights = head(*padded(bags, 113))
    for row, bag in enumerate(bags):
        alone, own = head(bag[None], torch.ones(1, len(bag), dtype=torch.bool))
        torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(weights[row, : len(bag)], own[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(bags)))
    assert (weights >= 0).all()


@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients_do_not_reach_padding(attention: str) -> None:
    head = a_head(attention).eval()
    batch, mask = padded(bags_of((3, 10), torch.float32), 12)
    batch.requires_grad_(True)
    head(batch, mask)[0].sum().backward()
    assert torch.isfinite(batch.grad).all()
    assert batch.grad[~mask].abs().sum() == 0 and (batch.grad[mask].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize(("length", "side"), [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (10, 4)])
def test_squares_repeat_the_first_instances(length: int, side: int) -> None:
    ((rows, index),) = transmil.squares(torch.tensor([length]))
    assert rows.tolist() == [0]
    assert index[0].tolist() == [*range(length), *range(side * side - length)]


def test_squares_stay_within_their_bags() -> None:
    groups = transmil.squares(torch.tensor([3, 9, 4]))
    assert [(rows.tolist(), index.tolist()) for rows, index in groups] == [
        ([0, 2], [[0, 1, 2, 0], [12, 13, 14, 15]]),
        ([1], [[*range(3, 12)]]),
    ]


def test_a_mask_may_have_holes() -> None:
    head, (bag,) = a_head().double().eval(), bags_of((7,))
    mask = torch.tensor([[True, False, True, True, False, False, True]])
    logits, weights = head(bag[None], mask)
    alone, own = head(bag[None][:, mask[0]], torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(logits, alone)
    torch.testing.assert_close(weights[mask], own[0])


def test_the_start_of_the_inverse_is_the_bags_own() -> None:
    draws = torch.Generator().manual_seed(2)
    matrix = torch.rand(3, 2, 4, 4, generator=draws, dtype=torch.float64).softmax(dim=3)
    matrix[1] = torch.eye(4).double()
    together = _nystrom.pseudo_inverse(matrix, 3)
    for row in range(3):
        alone = _nystrom.pseudo_inverse(matrix[row : row + 1], 3)[0]
        torch.testing.assert_close(together[row], alone)
        start = matrix[row].sum(dim=1).max() * matrix[row].sum(dim=2).max()
        for head in range(2):  # of one bag the start is shared, as in the authors' code
            wanted = nystrom_definition.inverse(matrix[row, head], 3, start)
            torch.testing.assert_close(together[row, head], wanted)


def test_with_a_landmark_a_token_the_masked_form_approaches_exact_attention() -> None:
    (bag,) = bags_of((16,))
    mask = torch.ones(1, 16, dtype=torch.bool)
    exact, weights = a_head().double().eval()(bag[None], mask)
    errors = []
    for iterations in (2, 8, 60):
        sizes = {"landmarks": 19, "pinv_iterations": iterations}
        found, shares = a_head("nystrom_masked", **sizes).double().eval()(bag[None], mask)
        errors.append((found - exact).detach().abs().max())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6
    torch.testing.assert_close(shares, weights, atol=1e-6, rtol=0)


def test_the_official_form_lets_zeros_take_part() -> None:
    (bag,) = bags_of((16,))
    mask = torch.ones(1, 16, dtype=torch.bool)
    sizes = {"landmarks": 64, "pinv_iterations": 60}
    forms = [a_head(form, **sizes).double().eval()(bag[None], mask)[0] for form in ATTENTION]
    exact, official, masked = forms
    assert (official - exact).abs().max() > 100 * (masked - exact).abs().max()


def test_the_order_of_instances_matters() -> None:
    head, (bag,) = a_head().eval(), bags_of((9,), torch.float32)
    mask = torch.ones(1, 9, dtype=torch.bool)
    assert (head(bag[None], mask)[0] - head(bag.flip(0)[None], mask)[0]).abs().max() > 1e-3


def test_a_new_fit_draws_the_class_token_anew() -> None:
    head = a_head()
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        head.reset_parameters()
        drawn.append(head.class_token.detach().clone())
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "linear"}, "attention is 'linear': it must be one of exact, nystrom, nys"),
        ({"width": 7}, "width is 7: it must be a multiple of heads, 2"),
        ({"landmarks": 0}, "landmarks is 0: it must be 1 or more"),
        ({"residual_tokens": 4}, "residual_tokens is 4: it must be odd"),
        ({"dropout": 1.0}, r"dropout is 1\.0: it must be 0 or more and below 1"),
    ],
)
def test_rejects_sizes_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"evaluate.transmil.{message}"):
        dataclasses.replace(a_head().params, **change)


def bags_with_a_key(count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Noise, and in bags of class 1 one instance that stands out."""
    rng = np.random.default_rng(seed)
    labels, bags = np.arange(count) % 2, []
    for label in labels:
        bag = rng.normal(size=(rng.integers(1, 14), DIM)).astype(np.float32)
        bag[rng.integers(len(bag)), 3] += 6.0 * label
        bags.append(bag)
    return bags, labels


def test_learns_from_the_instance_that_decides() -> None:
    # Of 40 bags it learns the orders of the noise by heart.
    train, val, test = (bags_with_a_key(80, seed) for seed in (1, 2, 3))
    training = TRAINING
    head = transmil.build(DIM, 2, transmil.Params(32, 2, "exact", 8, 6, 5, 0.1, training))
    head.fit(*train, *val, seed=5)
    probability, attention = head.predict(test[0])
    assert roc_auc_score(test[1], probability[:, 1]) > 0.95
    np.testing.assert_allclose(probability.sum(axis=1), 1)
    np.testing.assert_allclose([weights.sum() for weights in attention], 1, atol=1e-6)
