"""How heads learn: which loss and which optimizers, rates of the steps, and who is drawn."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages.heads import _optimizers, _training
from tests.stages import head_cases

LABELS = np.array([0, 1, 1, 0, 1])


class Network(nn.Module):
    """Two layers; says which loss it wants, and that each layer has an optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.standardise = _training.Standardise(3)
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, bag: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        weights = mask / mask.sum(dim=1, keepdim=True)
        return self.first(torch.einsum("bi,bid->bd", weights, self.standardise(bag))), weights

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        return [list(self.first.parameters()), list(self.second.parameters())]


class Own(Network):
    """Its loss moves the second layer only."""

    def loss(self, bag: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        self.seen.append((mask, labels))
        return 100 * self.second(bag[:, 0]).square().mean()


def bags() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(length, 3)).astype(np.float32) for length in (1, 4, 2, 3, 5)]


def settings(**other) -> _training.Training:
    return dataclasses.replace(head_cases.training(1, 0.01), **other)


def fitted(network: nn.Module, **other) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after the one step of an epoch; both from seed 3."""
    _training.fit(network, (bags(), LABELS), (bags(), LABELS), 3, settings(batch=5, **other))
    before = type(network)()
    torch.manual_seed(3)
    before.apply(_training._renew)
    return before.state_dict(), network.state_dict()


def test_a_networks_own_loss_is_what_trains_it() -> None:
    network = Own()
    before, after = fitted(network)
    assert torch.equal(before["first.weight"], after["first.weight"])
    assert not torch.equal(before["second.weight"], after["second.weight"])
    (mask, labels), order = network.seen[0], [1, 4, 2, 3, 5]
    assert sorted(mask.sum(dim=1).tolist()) == sorted(order) and labels.sum() == 3


def test_without_one_it_is_the_cross_entropy_of_the_logits() -> None:
    before, after = fitted(Network())
    assert not torch.equal(before["first.weight"], after["first.weight"])
    assert torch.equal(before["second.weight"], after["second.weight"])


def test_each_group_of_parameters_is_clipped_on_its_own() -> None:
    network = Network()
    optimizers = _optimizers.build(network, "adam", (0.9, 0.999), 0.0)
    for optimizer, gradient in zip(optimizers, (10.0, 0.1), strict=True):
        for value in optimizer.param_groups[0]["params"]:
            value.grad = torch.full_like(value, gradient)
    norms = []
    for optimizer in optimizers:  # what the optimizer is given, before it clears it
        optimizer.register_step_pre_hook(
            lambda one, *_: norms.append(
                nn.utils.get_total_norm([v.grad for v in one.param_groups[0]["params"]]).item()
            )
        )
    _optimizers.step(optimizers, 0.1, largest_norm=2.0)
    assert norms == pytest.approx([2.0, 0.1 * np.sqrt(8)], rel=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "lookahead_radam"])
def test_optimizers_are_what_they_are_called(name: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(4, dtype=torch.float64)
    network = nn.Module()
    network.weight = nn.Parameter(weight.clone())
    plain = nn.Parameter(weight.clone())
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(name, torch.optim.RAdam)
    other = kind([plain], lr=0.1, betas=(0.5, 0.9), weight_decay=0.2)
    (optimizer,) = _optimizers.build(network, name, (0.5, 0.9), 0.2)
    slow = None
    for at in range(1, 14):
        for value in (network.weight, plain):
            value.grad = value.detach() ** 3
        _optimizers.step([optimizer], 0.1, 0.0)
        other.step()
        if name == "lookahead_radam" and at % 6 == 0:  # slow weights start at the first meeting
            slow = plain.detach().clone() if slow is None else (slow + plain.detach()) / 2
            plain.data.copy_(slow)
    torch.testing.assert_close(network.weight, plain, rtol=1e-12, atol=0)


def test_the_rate_rises_over_the_warm_up_and_falls_by_a_cosine() -> None:
    def rates(kind: str, warmup: float) -> list[float]:
        return [_optimizers.rate_at(2.0, kind, warmup, at) for at in (0.1, 0.2, 0.6, 1.0)]

    assert rates("constant", 0.0) == pytest.approx([2, 2, 2, 2])
    assert rates("constant", 0.2) == pytest.approx([1, 2, 2, 2])
    assert rates("cosine", 0.2) == pytest.approx([1, 2, 1, 0])


def test_a_run_takes_its_rates_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(_optimizers, "step", lambda _, rate, __: seen.append(rate))
    params = settings(epochs=4, patience=4, batch=3, schedule="cosine", warmup_epochs=1.0)
    _training.fit(Network(), (bags(), LABELS), (bags(), LABELS), 3, params)
    assert len(seen) == 8 and seen[:2] == pytest.approx([0.0025, 0.0075])
    expected = [0.005 * (1 + np.cos(np.pi * (at + 0.5) / 6)) for at in range(6)]
    assert seen[2:] == pytest.approx(expected)


def test_balanced_drawing_shows_classes_alike() -> None:
    torch.manual_seed(0)
    labels = np.array([0] * 9 + [1])
    drawn = torch.cat([_training._order(labels, balanced=True) for _ in range(300)])
    assert len(drawn) == 3000 and abs((drawn == 9).double().mean().item() - 0.5) < 0.03
    assert sorted(_training._order(labels, balanced=False).tolist()) == list(range(10))


def test_standardising_is_a_choice_and_exact_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_training, "SLICE", 2)
    off, on = fitted(Network(), standardise=False)[1], fitted(Network(), standardise=True)[1]
    every = np.concatenate(bags()).astype(np.float64)
    assert off["standardise.mean"].abs().sum() == 0 and (off["standardise.scale"] == 1).all()
    np.testing.assert_allclose(on["standardise.mean"], every.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(on["standardise.scale"], every.std(axis=0), rtol=1e-5)


def test_the_epoch_kept_is_returned() -> None:
    params = settings(epochs=5, patience=5, learning_rate=1e-3)
    parts = (bags(), LABELS), (bags(), LABELS)
    assert 1 <= _training.fit(Network(), *parts, 3, params) <= 5
    # against labels turned round every step makes it worse: the first epoch is the best
    assert _training.fit(Network(), parts[0], (bags(), 1 - LABELS), 3, params) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("warmup_epochs", 1.0), ("warmup_epochs", -1.0), ("clip", -1.0), ("betas", (0.9, 1.0))],
)
def test_rejects_settings_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"training.{key} of a head"):
        settings(**{key: value})


def test_an_epoch_may_be_chosen_by_the_share_called_wrong() -> None:
    network = Network()
    logits, _ = network(*_training.pad(bags(), torch.device("cpu")))
    wrong = (logits.argmax(dim=1).numpy() != LABELS).mean()
    for batch in (1, 2, 5):
        chosen = settings(select="accuracy", batch=batch)
        found = _training._validation_loss(network, (bags(), LABELS), chosen)
        assert found == pytest.approx(wrong)
        by_loss = _training._validation_loss(network, (bags(), LABELS), settings(batch=batch))
        expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(LABELS))
        assert by_loss == pytest.approx(expected.item(), rel=1e-5)
    network.first.weight.data[0, 0] = torch.nan
    assert np.isnan(
        _training._validation_loss(network, (bags(), LABELS), settings(select="accuracy"))
    )
