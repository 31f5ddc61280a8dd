"""DTFD-MIL: pseudo-bags, and a second tier that reads what they distil (Zhang et al. 2022)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from stages.heads import _groups, _training
from stages.heads._gated import GatedAttention
from stages.heads._training import Bags, Labels

DISTILLATIONS = ("AFS", "MaxS", "MaxMinS", "MAS")


@dataclass(frozen=True)
class Params:
    """Section evaluate.dtfd_mil of params.yaml."""

    width: int  # outputs of the input projection (512 in the authors' code)
    attention_width: int  # hidden units of both tiers' attention (128)
    distillation: str  # AFS: a group's pooled vector; MaxS, MaxMinS, MAS: instances of it (AFS)
    groups: int  # pseudo-bags a bag is split into (4)
    inference_splits: int  # seeded random splits whose probabilities are averaged (1, unseeded)
    training: _training.Training

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        if self.distillation not in DISTILLATIONS:
            raise ValueError(
                f"evaluate.dtfd_mil.distillation is {self.distillation!r}: it must be one of "
                f"{', '.join(DISTILLATIONS)}"
            )
        for name in ("width", "attention_width", "groups", "inference_splits"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"evaluate.dtfd_mil.{name} is {getattr(self, name)}: it must be 1 or more"
                )


class FirstTier(nn.Module):
    """Projection, attention within each group, and the classifier of groups."""

    def __init__(self, dim: int, classes: int, params: Params) -> None:
        super().__init__()
        self.project = nn.Linear(dim, params.width, bias=False)
        self.attend = GatedAttention(params.width, params.attention_width)
        self.classify = nn.Linear(params.width, classes)

    def forward(
        self, bag: Float[Tensor, "batch instance dim"]
    ) -> tuple[Float[Tensor, "batch instance width"], Float[Tensor, "batch instance"]]:
        """Projected instances and their scores, whatever their groups."""
        hidden = torch.relu(self.project(bag))
        return hidden, self.attend(hidden)


class SecondTier(nn.Module):
    """Attention over what the groups distilled, and the classifier of bags."""

    def __init__(self, classes: int, params: Params) -> None:
        super().__init__()
        self.attend = GatedAttention(params.width, params.attention_width)
        self.classify = nn.Linear(params.width, classes)

    def forward(
        self,
        feature: Float[Tensor, "batch feature width"],
        present: Bool[Tensor, "batch feature"],
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch feature"]]:
        """Logits, and the attention; groups that a small bag lacks are not `present`."""
        attention = self.attend(feature).masked_fill(~present, float("-inf")).softmax(dim=1)
        return self.classify(torch.einsum("bf,bfw->bw", attention, feature)), attention


@dataclass(frozen=True)
class Distilled:
    """What the groups of a batch of bags give the second tier."""

    logits: Float[Tensor, "batch group classes"]  # of the groups' pooled vectors
    feature: Float[Tensor, "batch feature width"]  # one or two a group, those of a group together
    weights: Float[Tensor, "batch feature instance"]  # feature = weights @ projected instances
    present: Bool[Tensor, "batch feature"]  # False: of a group without instances


class DTFDMIL(nn.Module):
    """Two tiers that learn apart: the first from its groups, the second from what it is given.

    Source:
        Zhang et al. 2022, https://arxiv.org/abs/2203.12081, section 3, sizes as in the
        authors' code, and MAS as in the paper, which that code lacks. The second tier's loss never
        reaches the first, as there, by a cut in the graph: their order of steps raises on today's
        torch, and its usual repair lets it through. Differs from it in inference: the probability
        is the mean over `inference_splits` splits that follow from a bag's length alone, so that
        the same bag always gives the same numbers. Instances of more than two classes are ranked
        by the class that their group predicts, of two by the last as there. A bag smaller than
        `groups` has as many groups as instances. The learning rate is constant or a cosine, theirs
        falls to a fifth at epoch 100, and any epoch may be kept, theirs from the 160th on.
        Instances are standardised by the train instances where `training` says so.

    The attention returned is the weight of each instance in the bag's last vector: that of its
    group, times that in its group for AFS; the mean over the splits.
    """

    def __init__(self, dim: int, classes: int, params: Params) -> None:
        super().__init__()
        self.params, self.classes = params, classes
        self.standardise = _training.Standardise(dim)
        self.first = FirstTier(dim, classes, params)
        self.second = SecondTier(classes, params)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The two tiers' parameters, one optimizer each."""
        return [list(self.first.parameters()), list(self.second.parameters())]

    def forward(
        self,
        bag: Float[Tensor, "batch instance dim"],
        mask: Bool[Tensor, "batch instance"],
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch instance"]]:
        """Logarithms of the mean probabilities, and attention; 0 where `mask` is False."""
        splits = self.params.inference_splits
        hidden, score = self.first(self.standardise(bag))
        found = self._distil(hidden, score, _groups.seeded(mask, self.params.groups, splits))
        logits, attention = self.second(
            found.feature.unflatten(1, (splits, -1)).flatten(0, 1),
            found.present.unflatten(1, (splits, -1)).flatten(0, 1),
        )
        log_probability = logits.log_softmax(dim=1).unflatten(0, (-1, splits))
        attention = attention.unflatten(0, (-1, splits)).flatten(1) / splits
        log_mean = log_probability.logsumexp(dim=1) - math.log(splits)
        return log_mean, torch.einsum("bf,bfi->bi", attention, found.weights)

    def loss(
        self,
        bag: Float[Tensor, "batch instance dim"],
        mask: Bool[Tensor, "batch instance"],
        labels: Int64[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """Both tiers' losses on one newly drawn split, added: no parameter has part in both."""
        return sum(self.tier_losses(bag, mask, labels, _groups.drawn(mask, self.params.groups)))

    def tier_losses(
        self,
        bag: Float[Tensor, "batch instance dim"],
        mask: Bool[Tensor, "batch instance"],
        labels: Int64[Tensor, " batch"],
        members: Bool[Tensor, "batch group instance"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean cross-entropy of a bag's groups, and that of the bag; means over the bags."""
        hidden, score = self.first(self.standardise(bag))
        found = self._distil(hidden, score, members)
        every = F.cross_entropy(
            found.logits.flatten(0, 1), labels.repeat_interleave(members.shape[1]), reduction="none"
        ).unflatten(0, members.shape[:2])
        real = members.any(dim=2)
        first = ((every * real).sum(dim=1) / real.sum(dim=1)).mean()
        logits, _ = self.second(found.feature.detach(), found.present)
        return first, F.cross_entropy(logits, labels)

    def _distil(self, hidden: Tensor, score: Tensor, members: Tensor) -> Distilled:
        """Pool every group and take from it what the second tier reads."""
        # the lowest number, not -inf: a softmax over an empty group must have a gradient
        lowest = torch.finfo(score.dtype).min
        attention = score[:, None].masked_fill(~members, lowest).softmax(dim=2) * members
        pooled = attention @ hidden
        logits = self.first.classify(pooled)
        real = members.any(dim=2)
        if self.params.distillation == "AFS":
            return Distilled(logits, pooled, attention, real)
        with torch.no_grad():
            chosen = self._chosen(hidden, attention, logits, members)  # [batch, group, 1 or 2]
            present = real[:, :, None].expand(chosen.shape).flatten(1)
            weights = F.one_hot(chosen.flatten(1), hidden.shape[1]).to(hidden.dtype)
        return Distilled(logits, weights @ hidden, weights, present)

    def _chosen(
        self,
        hidden: Float[Tensor, "batch instance width"],
        attention: Float[Tensor, "batch group instance"],
        logits: Float[Tensor, "batch group classes"],
        members: Bool[Tensor, "batch group instance"],
    ) -> Int64[Tensor, "batch group chosen"]:
        """The instances of each group that pass its features on."""
        if self.params.distillation == "MAS":
            return attention.masked_fill(~members, -1).argmax(dim=2, keepdim=True)
        margin = self._margin(hidden, attention, logits)
        most = margin.masked_fill(~members, float("-inf")).argmax(dim=2, keepdim=True)
        if self.params.distillation == "MaxS":
            return most
        least = margin.masked_fill(~members, float("inf")).argmin(dim=2, keepdim=True)
        return torch.cat([most, least], dim=2)

    def _margin(
        self, hidden: Tensor, attention: Tensor, logits: Tensor
    ) -> Float[Tensor, "batch group instance"]:
        """Log odds of the class that ranks, from class activations without bias.

        They order instances as their probabilities do, and stay apart where those round to 1/2.
        """
        activation = F.linear(hidden, self.first.classify.weight)  # [batch, instance, classes]
        activation = attention[:, :, :, None] * activation[:, None]
        ranks = torch.full_like(logits[:, :, 0], self.classes - 1, dtype=torch.int64)
        if self.classes > 2:
            ranks = logits.argmax(dim=2)
        ranks = F.one_hot(ranks, self.classes).bool()[:, :, None]
        others = activation.masked_fill(ranks, float("-inf")).logsumexp(dim=3)
        return activation.masked_fill(~ranks, 0).sum(dim=3) - others

    def fit(
        self, bags_train: Bags, labels_train: Labels, bags_val: Bags, labels_val: Labels, seed: int
    ) -> None:
        """Train from new weights; see `stages.heads.Head`."""
        train, val = (bags_train, labels_train), (bags_val, labels_val)
        _training.fit(self, train, val, seed, self.params.training)

    def predict(
        self, bags: Bags
    ) -> tuple[Float64[np.ndarray, "slide classes"], list[Float64[np.ndarray, " instance"]]]:
        """Probabilities and attention; see `stages.heads.Head`."""
        return _training.predict(self, bags, self.params.training.batch)


def build(dim: int, classes: int, params: Params) -> DTFDMIL:
    """An untrained DTFD-MIL for instances of `dim` numbers."""
    return DTFDMIL(dim, classes, params)
