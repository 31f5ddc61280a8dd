"""How every torch head learns and predicts: one short loop, the epoch chosen on validation."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Bags = list[Float32[np.ndarray, "instance dim"]]
Labels = Int64[np.ndarray, " slide"]
Labelled = tuple[Bags, Labels]


@dataclass(frozen=True)
class Training:
    """Key `training` of a torch head's section."""

    epochs: int  # passes over the train bags, at most
    patience: int  # epochs without a lower validation loss before training ends
    batch: int  # bags a step
    learning_rate: float  # of Adam, no unit
    weight_decay: float  # of Adam (L2), no unit

    def __post_init__(self) -> None:
        """Reject values that train nothing."""
        for name in ("epochs", "patience", "batch", "learning_rate"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"training.{name} of a head is {value}: it must be above 0")
        if self.weight_decay < 0:
            raise ValueError(
                f"training.weight_decay is {self.weight_decay}: it must not be below 0"
            )


class Standardise(nn.Module):
    """Shift and scale each dimension by the train instances; does nothing before `learn`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def learn(self, bags: Bags) -> None:
        """Take mean and standard deviation of all instances of the train bags."""
        instances = np.concatenate(bags).astype(np.float64)  # [instance, dim]
        scale = instances.std(axis=0)
        scale[scale == 0] = 1.0  # a constant dimension carries nothing, whatever divides it
        self.mean.copy_(torch.from_numpy(instances.mean(axis=0)))
        self.scale.copy_(torch.from_numpy(scale))

    def forward(self, bag: Float[Tensor, "batch instance dim"]) -> Float[Tensor, "..."]:
        """The bag with standardised dimensions."""
        return (bag - self.mean) / self.scale


def fit(network: nn.Module, train: Labelled, val: Labelled, seed: int, params: Training) -> None:
    """Train from new weights; keep those of the epoch with the lowest validation loss.

    Everything random (weights, order of the bags, dropout) follows from `seed`. Of equal
    validation losses the earlier epoch stays.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.apply(_renew).to(_device())
        network.standardise.learn(train[0])
        optimizer = torch.optim.Adam(
            network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay
        )
        best_loss, best_weights, waited = float("inf"), None, 0
        for _ in range(params.epochs):
            _train_epoch(network, train, optimizer, params.batch)
            loss = _validation_loss(network, val, params.batch)
            waited += 1
            if loss < best_loss:
                best_loss, best_weights, waited = loss, copy.deepcopy(network.state_dict()), 0
            if waited == params.patience:
                break
    if best_weights is None:
        raise ValueError("the head's loss is not finite from the start: lower its learning_rate")
    network.load_state_dict(best_weights)


@torch.no_grad()
def predict(
    network: nn.Module, bags: Bags, batch: int
) -> tuple[Float64[np.ndarray, "slide classes"], list[Float64[np.ndarray, " instance"]]]:
    """Class probabilities of each bag, and the attention on its instances."""
    network.eval()
    probability, attention = [], []
    for chosen in torch.arange(len(bags)).split(batch):
        logits, weights = network(*pad([bags[at] for at in chosen], _device_of(network)))
        probability.append(logits.double().softmax(dim=1).cpu().numpy())
        for at, row in zip(chosen, weights.double().cpu().numpy(), strict=True):
            attention.append(row[: len(bags[at])])
    return np.concatenate(probability), attention


def pad(
    bags: Bags, device: torch.device
) -> tuple[Float[Tensor, "batch instance dim"], Bool[Tensor, "batch instance"]]:
    """Bags of different lengths as one tensor, and the mask that is True on real instances."""
    padded = pad_sequence([torch.from_numpy(bag) for bag in bags], batch_first=True)
    lengths = torch.tensor([len(bag) for bag in bags])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return padded.to(device), mask.to(device)


def _train_epoch(
    network: nn.Module, train: Labelled, optimizer: torch.optim.Optimizer, batch: int
) -> None:
    network.train()
    order = torch.randperm(len(train[0]))
    for logits, labels in _batches(network, train, order, batch):
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _validation_loss(network: nn.Module, val: Labelled, batch: int) -> float:
    network.eval()
    total = 0.0
    for logits, labels in _batches(network, val, torch.arange(len(val[0])), batch):
        total += F.cross_entropy(logits, labels, reduction="sum").item()
    return total / len(val[0])


def _batches(
    network: nn.Module, labelled: Labelled, order: Int64[Tensor, " slide"], batch: int
) -> Iterator[tuple[Float[Tensor, "batch classes"], Int64[Tensor, " batch"]]]:
    bags, labels = labelled
    for chosen in order.split(batch):
        logits, _ = network(*pad([bags[at] for at in chosen], _device_of(network)))
        yield logits, torch.from_numpy(labels)[chosen].to(logits.device)


def _renew(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
