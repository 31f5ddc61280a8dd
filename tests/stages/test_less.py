"""LESS: its aggregator against the definition, both scales, batches, recomputation, widths."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from stages.heads import _training, less
from tests.definitions import less as definition
from tests.stages import head_cases

DIM = 10
LENGTHS = (1, 2, 5, 7)
CROPS, PATCHES = slice(DIM // 2, None), slice(0, DIM // 2)

TRAINING = dataclasses.replace(head_cases.training(25, 3e-3), batch=8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def a_head(training: _training.Training | None = None, dim: int = DIM, **other) -> less.LESS:
    torch.manual_seed(3)
    values = {"project": True, "dims": (4, 6), "depths": (1, 2), "stages": 2} | other
    params = less.Params(heads=2, mlp_ratio=2, training=training, **values)
    head = less.build(dim, 3, params)
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


@pytest.mark.parametrize("project", [True, False])
def test_a_batch_is_the_definition_bag_by_bag(project: bool) -> None:
    head = a_head(project=project).double().eval()
    bags = bags_of(LENGTHS)
    logits, found = head(*padded(bags, 11))
    weight = dict(head.named_parameters()) | dict(head.named_buffers())
    width = 5 if project else 6
    expected = [definition.less(weight, bag, 2, (1, 2), 2, width, project) for bag in bags]
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


def test_padding_and_batching_change_nothing() -> None:
    head = a_head().eval()
    bags = bags_of((*LENGTHS, 101), torch.float32)
    logits, weights = head(*padded(bags, 113))
    for row, bag in enumerate(bags):
        alone, own = head(bag[None], torch.ones(1, len(bag), dtype=torch.bool))
        torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(weights[row, : len(bag)], own[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(bags)))


def test_gradients_do_not_reach_padding() -> None:
    head = a_head().eval()
    batch, mask = padded(bags_of((3, 10), torch.float32), 12)
    batch.requires_grad_(True)
    head(batch, mask)[0].sum().backward()
    assert torch.isfinite(batch.grad).all()
    assert batch.grad[~mask].abs().sum() == 0 and (batch.grad[mask].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("scale", [PATCHES, CROPS])
def test_both_scales_decide(scale: slice) -> None:
    head, (bag,) = a_head().eval(), bags_of((7,), torch.float32)
    mask, changed = torch.ones(1, 7, dtype=torch.bool), bag.clone()
    changed[4, scale] += 3.0
    assert (head(bag[None], mask)[0] - head(changed[None], mask)[0]).abs().max() > 1e-3


def test_the_order_of_instances_does_not_matter() -> None:
    head, (bag,) = a_head().double().eval(), bags_of((9,))
    mask, order = torch.ones(1, 9, dtype=torch.bool), torch.randperm(9)
    logits, weights = head(bag[None], mask)
    shuffled, own = head(bag[order][None], mask)
    torch.testing.assert_close(shuffled, logits)
    torch.testing.assert_close(own[0], weights[0, order])


def test_recomputing_blocks_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    head, calls = a_head().double(), []
    batch, mask = padded(bags_of(LENGTHS), 11)
    checkpoint = less.checkpoint

    def counted(*given: object, **settings: object) -> torch.Tensor:
        calls.append(given[0])
        return checkpoint(*given, **settings)

    monkeypatch.setattr(less, "checkpoint", counted)
    gradients = []
    for above, expected in ((11, 6), (12, 6)):  # 11 instances and the class token; 6 blocks
        monkeypatch.setattr(less, "RECOMPUTE_ABOVE", above)
        gradients.append(torch.autograd.grad(head(batch, mask)[0].sum(), head.parameters()))
        assert len(calls) == expected
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)


def test_the_papers_sizes_have_the_papers_count_of_parameters() -> None:
    params = less.Params(False, (384, 768), 16, (1, 4), 3, 4, training=None)
    with torch.device("meta"):
        head = less.build(1152, 2, params)
    assert sum(value.numel() for value in head.parameters()) == 102_811_396


def test_a_new_fit_draws_every_weight_anew() -> None:
    head, drawn = a_head(), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        head.apply(_training._renew)
        drawn.append({name: value.detach().clone() for name, value in head.named_parameters()})
    assert 0.015 < drawn[0]["stages.0.blocks.1.0.mlp.0.weight"].std() < 0.025  # CrossViT's 0.02
    for name, value in drawn[0].items():
        assert torch.equal(value, drawn[2][name])
        constant = bool((value == value.flatten()[0]).all())  # of norms, and biases
        assert constant or not torch.equal(value, drawn[1][name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": (4, 7)}, r"dims is \[4, 7\]: both must be multiples of heads, 2"),
        ({"depths": (-1, 2)}, r"depths is \[-1, 2\]: both must be 0 or more"),
        ({"stages": 0}, "stages is 0: it must be 1 or more"),
    ],
)
def test_rejects_sizes_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"evaluate.less.{message}"):
        dataclasses.replace(a_head().params, **change)


def test_rejects_bags_of_another_width() -> None:
    with pytest.raises(ValueError, match="instances of 9 numbers came to the head less: it must"):
        a_head(dim=9)
    with pytest.raises(ValueError, match="have 12 numbers: they must have 10, 6 of the patch and"):
        a_head(dim=12, project=False)


def bags_with_a_key(count: int, seed: int, part: slice) -> tuple[list[np.ndarray], np.ndarray]:
    """Noise, and in bags of class 1 one instance that stands out at one scale."""
    rng = np.random.default_rng(seed)
    labels, bags = np.arange(count) % 2, []
    for label in labels:
        bag = rng.normal(size=(rng.integers(1, 14), DIM)).astype(np.float32)
        bag[rng.integers(len(bag)), part] += 3.0 * label
        bags.append(bag)
    return bags, labels


@pytest.mark.parametrize("scale", [PATCHES, CROPS])
def test_learns_from_either_scale(scale: slice) -> None:
    train, val, test = (bags_with_a_key(40, seed, scale) for seed in (1, 2, 3))
    training = TRAINING
    head = less.build(DIM, 2, less.Params(True, (16, 24), 2, (1, 1), 1, 2, training))
    head.fit(*train, *val, seed=5)
    probability, attention = head.predict(test[0])
    assert roc_auc_score(test[1], probability[:, 1]) > 0.95
    np.testing.assert_allclose(probability.sum(axis=1), 1)
    np.testing.assert_allclose([weights.sum() for weights in attention], 1, atol=1e-6)
