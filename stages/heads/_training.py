"""How every torch head learns and predicts: one short loop, the epoch chosen on validation."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stages.common import devices
from stages.heads import _optimizers

Bags = list[Float32[np.ndarray, "instance dim"]]
Labels = Int64[np.ndarray, " slide"]
Labelled = tuple[Bags, Labels]
SLICE = 8192  # instances that are held in double precision at once


@dataclass(frozen=True)
class Training:
    """Key `training` of a torch head's section."""

    epochs: int  # passes over the train bags, at most
    patience: int  # epochs without a lower validation loss before training ends
    batch: int  # bags a step
    learning_rate: float  # peak, no unit
    weight_decay: float  # L2 (adam, lookahead_radam) or decoupled (adamw), no unit
    betas: tuple[float, float]  # decay of the first and second moment, shares
    optimizer: _optimizers.Name
    schedule: _optimizers.Schedule  # of the learning rate over all epochs
    warmup_epochs: float  # epochs over which the learning rate rises from 0
    clip: float  # largest norm of each optimizer's gradient; 0: any
    balanced: bool  # draw bags with replacement, every class as often
    select: Literal["loss", "accuracy"]  # what the kept epoch is the best in, on validation
    standardise: bool  # shift and scale each dimension by the train instances

    def __post_init__(self) -> None:
        """Reject values that train nothing."""
        for name in ("epochs", "patience", "batch", "learning_rate"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"training.{name} of a head is {value}: it must be above 0")
        for name in ("weight_decay", "warmup_epochs", "clip"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"training.{name} of a head is {value}: it must not be below 0")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"training.warmup_epochs of a head is {self.warmup_epochs}: it must be below its "
                f"epochs, {self.epochs}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training.betas of a head are {self.betas}: each must be in [0, 1)")


class Standardise(nn.Module):
    """Shift and scale each dimension by the train instances; does nothing before `learn`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def learn(self, bags: Bags) -> None:
        """Take mean and standard deviation of all instances of the train bags, slice by slice."""
        count = sum(map(len, bags))
        mean = sum(part.sum(axis=0) for part in _slices(bags)) / count
        scale = np.sqrt(sum(((part - mean) ** 2).sum(axis=0) for part in _slices(bags)) / count)
        scale[scale == 0] = 1.0  # a constant dimension carries nothing, whatever divides it
        self.mean.copy_(torch.from_numpy(mean))
        self.scale.copy_(torch.from_numpy(scale))

    def forward(self, bag: Float[Tensor, "batch instance dim"]) -> Float[Tensor, "..."]:
        """The bag with standardised dimensions."""
        return (bag - self.mean) / self.scale


def fit(network: nn.Module, train: Labelled, val: Labelled, seed: int, params: Training) -> int:
    """Train from new weights; keep those of the epoch that is best on validation.

    A network may say how it learns: `loss(bag, mask, labels)`, a mean over the bags, in place of
    the cross-entropy of its logits, and `parameter_groups()`, lists of parameters with an
    optimizer each. The validation loss is the cross-entropy of its logits always, or with `select:
    accuracy` the share that they call wrong. Everything random (weights, order of the bags,
    dropout) follows from `seed`. Of equal epochs the earlier stays.

    Returns:
        The epoch kept, from 1.

    Raises:
        ValueError: the validation loss was never finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.apply(_renew).to(_device())
        if params.standardise:
            network.standardise.learn(train[0])
        optimizers = _optimizers.build(network, params.optimizer, params.betas, params.weight_decay)
        best_loss, best_weights, best_epoch = float("inf"), None, 0
        for epoch in range(1, params.epochs + 1):
            _train_epoch(network, train, optimizers, params, epoch)
            loss = _validation_loss(network, val, params)
            if loss < best_loss:
                best_loss, best_weights, best_epoch = (
                    loss,
                    copy.deepcopy(network.state_dict()),
                    epoch,
                )
            if epoch - best_epoch == params.patience:
                break
    if best_weights is None:
        raise ValueError("the head's loss is not finite from the start: lower its learning_rate")
    network.load_state_dict(best_weights)
    return best_epoch


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
    network: nn.Module,
    train: Labelled,
    optimizers: list[torch.optim.Optimizer],
    params: Training,
    epoch: int,
) -> None:
    network.train()
    loss_of = getattr(network, "loss", partial(_cross_entropy, network))
    batches = list(_order(train[1], params.balanced).split(params.batch))
    warmup = params.warmup_epochs / params.epochs
    for at, chosen in enumerate(batches):
        loss_of(*_batch(network, train, chosen)).backward()
        # the middle of the step: no step of a warm-up or of a cosine is then of rate 0
        progress = (epoch - 1 + (at + 0.5) / len(batches)) / params.epochs
        rate = _optimizers.rate_at(params.learning_rate, params.schedule, warmup, progress)
        _optimizers.step(optimizers, rate, params.clip)


def _order(labels: Labels, balanced: bool) -> Int64[Tensor, " slide"]:
    """The bags of an epoch in order: each once, or as many drawn from each class alike."""
    if not balanced:
        return torch.randperm(len(labels))
    found = torch.from_numpy(labels)
    weights = 1 / found.bincount().double()[found]
    return torch.multinomial(weights, len(labels), replacement=True)


@torch.no_grad()
def _validation_loss(network: nn.Module, val: Labelled, params: Training) -> float:
    """The mean over the bags, of what `select` names; NaN where a logit is none."""
    network.eval()
    total = 0.0
    for chosen in torch.arange(len(val[0])).split(params.batch):
        bag, mask, labels = _batch(network, val, chosen)
        logits = network(bag, mask)[0]
        if params.select == "loss":
            total += F.cross_entropy(logits, labels, reduction="sum").item()
        else:
            wrong = (logits.argmax(dim=1) != labels).float() + 0 * logits.sum(dim=1)
            total += wrong.sum().item()
    return total / len(val[0])


def _cross_entropy(
    network: nn.Module, bag: Tensor, mask: Tensor, labels: Tensor
) -> Float[Tensor, ""]:
    return F.cross_entropy(network(bag, mask)[0], labels)


def _batch(
    network: nn.Module, labelled: Labelled, chosen: Int64[Tensor, " batch"]
) -> tuple[Tensor, Tensor, Tensor]:
    bags, labels = labelled
    bag, mask = pad([bags[at] for at in chosen], _device_of(network))
    return bag, mask, torch.from_numpy(labels)[chosen].to(bag.device)


def _slices(bags: Bags) -> Iterator[Float64[np.ndarray, "instance dim"]]:
    """All instances in double precision, few thousand at a time: bags may be gigabytes."""
    for bag in bags:
        for start in range(0, len(bag), SLICE):
            yield bag[start : start + SLICE].astype(np.float64)


def _renew(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def _device() -> torch.device:
    return torch.device(devices.pick("auto", "evaluate"))


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
