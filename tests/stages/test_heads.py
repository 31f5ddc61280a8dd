"""Heads: the printed mathematics, padding, learning, and what decides when training ends."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from stages.common import plugins
from stages.heads import _training, abmil, meanpool
from tests.stages import head_cases

TRAINING = head_cases.training(40, 2e-3)
DIM = 7


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def a_head(variant: str = "gated", training: _training.Training = TRAINING) -> abmil.ABMIL:
    torch.manual_seed(0)
    params = abmil.Params(width=31, attention_width=13, variant=variant, training=training)
    return abmil.build(DIM, 2, params)


def bags_with_a_key(count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray, list[int]]:
    """Noise, and in bags of class 1 one instance that stands out; where it is, else -1."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    bags, places = [], []
    for label in labels:
        bag = rng.normal(size=(rng.integers(11, 24), DIM)).astype(np.float32)
        place = int(rng.integers(len(bag)))
        if label:
            bag[place, 3] += 6.0
        bags.append(bag)
        places.append(place if label else -1)
    return bags, labels, places


def by_the_equations(head: abmil.ABMIL, bag: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ilse et al. 2018, equations 7 to 9, one instance at a time in float64."""
    weight = {name: value.double().numpy() for name, value in head.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return weight[f"{name}.weight"] @ x + weight[f"{name}.bias"]

    hidden, scores = [], []
    for instance in bag.astype(np.float64):
        h = np.maximum(linear("project", instance), 0)
        score = np.tanh(linear("attend_tanh", h))
        if "attend_gate.weight" in weight:
            score = score / (1 + np.exp(-linear("attend_gate", h)))
        hidden.append(h)
        scores.append(float(linear("attend_out", score)[0]))
    attention = np.exp(scores) / sum(np.exp(scores))
    pooled = sum(a * h for a, h in zip(attention, hidden, strict=True))
    return linear("classify", pooled), attention


@pytest.mark.parametrize("variant", ["gated", "plain", "clam"])
def test_abmil_is_the_printed_equations(variant: str) -> None:
    head = a_head(variant).eval()
    bag = np.random.default_rng(1).normal(size=(5, DIM)).astype(np.float32)
    logits, attention = head(torch.from_numpy(bag)[None], torch.ones(1, 5, dtype=torch.bool))
    expected_logits, expected_attention = by_the_equations(head, bag)
    np.testing.assert_allclose(logits[0].detach(), expected_logits, atol=1e-5)
    np.testing.assert_allclose(attention[0].detach(), expected_attention, atol=1e-6)


def test_plain_and_gated_attention_differ() -> None:
    bag = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 5, DIM)).astype(np.float32))
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert a_head("plain").attend_gate is None
    assert not torch.allclose(a_head("gated")(bag, mask)[1], a_head("plain")(bag, mask)[1])


@pytest.mark.parametrize("variant", ["gated", "plain", "clam"])
def test_padding_and_batching_change_nothing(variant: str) -> None:
    head, rng = a_head(variant).eval(), np.random.default_rng(2)
    bags = [rng.normal(size=(length, DIM)).astype(np.float32) for length in (1, 17, 5)]
    padded, mask = _training.pad(bags, torch.device("cpu"))
    padded[~mask] = 1e3  # what padding holds must not matter
    logits, attention = head(padded, mask)
    for at, bag in enumerate(bags):
        alone, weights = head(torch.from_numpy(bag)[None], torch.ones(1, len(bag)).bool())
        torch.testing.assert_close(logits[at], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(attention[at, : len(bag)], weights[0], atol=1e-5, rtol=0)
        assert attention[at, len(bag) :].abs().sum() == 0
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(3))


def test_the_gradient_ignores_padding() -> None:
    head, rng = a_head(), np.random.default_rng(2)
    bags = [rng.normal(size=(length, DIM)).astype(np.float32) for length in (3, 11)]
    padded, mask = _training.pad(bags, torch.device("cpu"))
    padded.requires_grad_(True)
    head(padded, mask)[0].sum().backward()
    assert padded.grad is not None and torch.isfinite(padded.grad).all()
    assert padded.grad[~mask].abs().sum() == 0 and padded.grad[mask].abs().sum() > 0


def test_permuting_instances_permutes_attention_only() -> None:
    head, order = a_head(), [3, 0, 4, 1, 2]
    bag = np.random.default_rng(3).normal(size=(5, DIM)).astype(np.float32)
    probability, (attention,) = head.predict([bag])
    shuffled, (weights,) = head.predict([bag[order]])
    np.testing.assert_allclose(shuffled, probability, atol=1e-6)
    np.testing.assert_allclose(weights, attention[order], atol=1e-6)


@pytest.mark.parametrize("variant", ["gated", "plain", "clam"])
def test_abmil_learns_the_instance_that_decides_and_points_at_it(variant: str) -> None:
    train, val, test = (bags_with_a_key(60, seed) for seed in (1, 2, 3))
    head = a_head(variant)
    head.fit(train[0], train[1], val[0], val[1], seed=5)
    probability, attention = head.predict(test[0])
    assert roc_auc_score(test[1], probability[:, 1]) > 0.95
    found = [w.argmax() == place for w, place in zip(attention, test[2], strict=True) if place >= 0]
    assert np.mean(found) > 0.9
    np.testing.assert_allclose(probability.sum(axis=1), 1)
    np.testing.assert_allclose([weights.sum() for weights in attention], 1, atol=1e-6)


def test_permuted_labels_give_chance() -> None:
    scores = []
    for seed in range(6):
        train, val, test = (bags_with_a_key(30, 10 * seed + part) for part in range(3))
        rng = np.random.default_rng(seed)
        head = a_head()
        head.fit(train[0], rng.permutation(train[1]), val[0], rng.permutation(val[1]), seed)
        scores.append(roc_auc_score(rng.permutation(test[1]), head.predict(test[0])[0][:, 1]))
    assert abs(np.mean(scores) - 0.5) < 0.15


def test_the_scale_of_embeddings_does_not_matter() -> None:
    train, val, test = (bags_with_a_key(20, seed) for seed in (1, 2, 3))
    outcomes = []
    for factor in (1.0, 1024.0):
        head = a_head()
        head.fit([factor * b for b in train[0]], train[1], [factor * b for b in val[0]], val[1], 3)
        outcomes.append(head.predict([factor * b for b in test[0]])[0])
    np.testing.assert_allclose(outcomes[0], outcomes[1], atol=1e-5)


def test_same_seed_same_numbers_another_seed_others() -> None:
    train, val, test = (bags_with_a_key(12, seed) for seed in (1, 2, 3))
    head = a_head()

    def run(seed: int) -> np.ndarray:
        head.fit(train[0], train[1], val[0], val[1], seed)
        return head.predict(test[0])[0]

    first, other, again = run(3), run(4), run(3)  # a second fit starts from new weights
    assert np.array_equal(first, again) and not np.allclose(first, other)


def test_fitting_leaves_the_global_generator_alone() -> None:
    train, head = bags_with_a_key(6, 1), a_head()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    head.fit(train[0], train[1], train[0], train[1], seed=3)
    assert torch.equal(torch.rand(3), expected)


def losses_are(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[dict]:
    """Let validation report `losses`; returns the weights after each epoch."""
    seen: list[dict] = []

    def validation_loss(network: torch.nn.Module, *_: object) -> float:
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return losses[len(seen) - 1]

    monkeypatch.setattr(_training, "_validation_loss", validation_loss)
    return seen


def test_the_epoch_with_the_lowest_validation_loss_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = losses_are(monkeypatch, [0.9, 0.4, 0.6, 0.4, 0.7, 0.1])
    head = a_head(training=dataclasses.replace(TRAINING, epochs=6, patience=3))
    train = bags_with_a_key(10, 1)
    head.fit(train[0], train[1], train[0], train[1], seed=3)
    assert len(seen) == 5  # patience 3 after the second epoch: 0.1 is never reached
    assert all(torch.equal(value, seen[1][name]) for name, value in head.state_dict().items())


def test_rejects_a_loss_that_is_never_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    losses_are(monkeypatch, [float("nan")] * 40)
    train, head = bags_with_a_key(4, 1), a_head()
    with pytest.raises(ValueError, match="lower its learning_rate"):
        head.fit(train[0], train[1], train[0], train[1], seed=3)


@pytest.mark.parametrize("field", ["epochs", "patience", "batch", "learning_rate"])
def test_rejects_training_that_does_nothing(field: str) -> None:
    with pytest.raises(ValueError, match=f"training.{field} of a head is 0"):
        dataclasses.replace(TRAINING, **{field: 0})


def test_meanpool_matches_a_hand_computation() -> None:
    """Newton's method on the penalised likelihood of standardised bag means."""
    rng = np.random.default_rng(4)
    bags = [rng.normal(size=(rng.integers(2, 9), 3)).astype(np.float32) for _ in range(11)]
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1])
    head = meanpool.build(3, 2, meanpool.Params(strengths=(0.7,)))
    head.fit(bags, labels, bags, labels, seed=0)
    probability, attention = head.predict(bags)

    means = np.array([bag.astype(np.float64).sum(axis=0) / len(bag) for bag in bags])
    x = np.c_[(means - means.mean(axis=0)) / means.std(axis=0), np.ones(11)]
    penalty = np.diag([1, 1, 1, 0]) / 0.7  # the intercept is free
    w = np.zeros(4)
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ w))
        curvature = x.T @ (x * (p * (1 - p))[:, None]) + penalty
        w -= np.linalg.solve(curvature, x.T @ (p - labels) + penalty @ w)
    np.testing.assert_allclose(probability[:, 1], 1 / (1 + np.exp(-x @ w)), atol=1e-4)
    np.testing.assert_allclose(attention[0], np.full(len(bags[0]), 1 / len(bags[0])))


def test_meanpool_standardises_by_the_train_slides() -> None:
    train, val, test = (bags_with_a_key(12, seed) for seed in (1, 2, 3))
    head = meanpool.build(DIM, 2, meanpool.Params(strengths=(1.0,)))
    head.fit(train[0], train[1], val[0], val[1], seed=0)
    together, _ = head.predict(test[0])
    alone = np.concatenate([head.predict([bag])[0] for bag in test[0]])
    np.testing.assert_allclose(alone, together)


def test_meanpool_takes_the_strength_that_validation_prefers() -> None:
    train, val = bags_with_a_key(30, 1), bags_with_a_key(30, 2)
    for bags, labels, _ in (train, val):
        bags[:] = [bag + np.float32(label) for bag, label in zip(bags, labels, strict=True)]
    free = meanpool.build(DIM, 2, meanpool.Params(strengths=(100.0, 1e-4)))
    free.fit(train[0], train[1], val[0], val[1], seed=0)
    tight = meanpool.build(DIM, 2, meanpool.Params(strengths=(100.0, 1e-4)))
    tight.fit(train[0], train[1], val[0], 1 - val[1], seed=0)  # any slope hurts
    assert np.ptp(free.predict(val[0])[0][:, 1]) > 0.5
    assert np.ptp(tight.predict(val[0])[0][:, 1]) < 0.05


def test_rejects_a_strength_of_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        meanpool.Params(strengths=(0.0, 1.0))


def test_every_head_has_params_and_build() -> None:
    for name in plugins.names("heads"):
        module = plugins.load("heads", name)
        assert hasattr(module, "Params") and callable(module.build)
