"""CLAM-SB: gated attention pooling, and instances that attention itself labels (Lu et al. 2021)."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from cytossl_core.losses import smooth_top1_svm
from stages.heads import _training
from stages.heads._gated import GatedAttention
from stages.heads._training import Bags, Labels

INSTANCE_LOSSES = ("svm", "ce")
ATTENTION_DROPOUT = 0.25  # of the authors' code, wherever there is dropout at all


@dataclass(frozen=True)
class Params:
    """Section evaluate.clam_sb of params.yaml."""

    width: int  # outputs of the input projection (512 in the authors' code)
    attention_width: int  # hidden units of the attention (their small: 256, big: 384)
    dropout: float  # behind the projection, share; above 0, the attention's is 0.25 (0.25)
    instance_loss: str  # svm: smooth top-1 SVM (the official commands'), ce: cross-entropy
    k_sample: int  # instances of highest, and as many of lowest attention, that are labelled (8)
    bag_weight: float  # of the bag's loss; the rest weighs the instance loss (0.7)
    subtyping: bool  # classes exclude each other: most attended instances belong to no other
    training: _training.Training

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        name = "evaluate.clam_sb"
        if self.instance_loss not in INSTANCE_LOSSES:
            raise ValueError(
                f"{name}.instance_loss is {self.instance_loss!r}: it must be one of "
                f"{', '.join(INSTANCE_LOSSES)}"
            )
        for key in ("width", "attention_width", "k_sample"):
            if getattr(self, key) < 1:
                raise ValueError(f"{name}.{key} is {getattr(self, key)}: it must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{name}.dropout is {self.dropout}: it must be 0 or more, below 1")
        if not 0 <= self.bag_weight <= 1:
            raise ValueError(f"{name}.bag_weight is {self.bag_weight}: it must be from 0 to 1")


class ClamSB(nn.Module):
    """Projection, one branch of gated attention, bag classifier, one instance classifier a class.

    Source:
        Lu et al. 2021, https://arxiv.org/abs/2004.09666, Methods, single-branch form with the
        sizes, dropout and weights of the authors' code. Differs from it where bags are small: the
        k_sample highest and k_sample lowest instances of a bag below 2 * k_sample overlap there
        (below k_sample it raises), and an instance is told to be both; here half of the bag, at
        most, counts as high and as many as low, a bag of one trains the bag classifier alone.
        Loss and gradients are means over the bags of a batch; the authors' batch is one bag.
        Training may stop early from the first epoch on, theirs from the 50th.
        Instances are standardised by the train instances where `training` says so.
    """

    def __init__(self, dim: int, classes: int, params: Params) -> None:
        super().__init__()
        self.params, self.classes = params, classes
        self.standardise = _training.Standardise(dim)
        self.project = nn.Linear(dim, params.width)
        self.dropout = nn.Dropout(params.dropout)
        attention_dropout = ATTENTION_DROPOUT if params.dropout > 0 else 0.0
        self.attend = GatedAttention(params.width, params.attention_width, attention_dropout)
        self.classify = nn.Linear(params.width, classes)
        self.classify_instance = nn.Linear(params.width, 2 * classes)  # a pair of rows a class

    def forward(
        self,
        bag: Float[Tensor, "batch instance dim"],
        mask: Bool[Tensor, "batch instance"],
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch instance"]]:
        """Class logits and attention; where `mask` is False an instance is padding."""
        logits, attention, _, _ = self._read(bag, mask)
        return logits, attention

    def loss(
        self,
        bag: Float[Tensor, "batch instance dim"],
        mask: Bool[Tensor, "batch instance"],
        labels: Int64[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """Weighted sum of the bags' cross-entropy and of the instance loss, mean over the bags."""
        logits, _, hidden, score = self._read(bag, mask)
        of_bags = F.cross_entropy(logits, labels)
        of_instances = self._instance_loss(hidden, score, mask, labels).mean()
        weight = self.params.bag_weight
        return weight * of_bags + (1 - weight) * of_instances

    def _read(self, bag: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, attention, projected instances and their scores before the softmax."""
        hidden = self.dropout(torch.relu(self.project(self.standardise(bag))))
        score = self.attend(hidden)
        attention = score.masked_fill(~mask, float("-inf")).softmax(dim=1)
        pooled = torch.einsum("bi,biw->bw", attention, hidden)
        return self.classify(pooled), attention, hidden, score

    def _instance_loss(
        self,
        hidden: Float[Tensor, "batch instance width"],
        score: Float[Tensor, "batch instance"],
        mask: Bool[Tensor, "batch instance"],
        labels: Int64[Tensor, " batch"],
    ) -> Float[Tensor, " batch"]:
        """Own class: high instances are of it, low ones are not; other classes: high are not."""
        k, lengths = self.params.k_sample, mask.sum(dim=1)
        high, low = (self._chosen(hidden, sign * score, mask) for sign in (1, -1))
        own = F.one_hot(labels, self.classes).to(hidden.dtype)
        half = (lengths // 2).clamp_max(k)
        of_own = _mean(self._row_loss(high, 1), half) + _mean(self._row_loss(low, 0), half)
        total = (own * of_own / 2).sum(dim=1)
        if self.params.subtyping:
            of_others = _mean(self._row_loss(high, 0), lengths.clamp_max(k))
            total = (total + ((1 - own) * of_others).sum(dim=1)) / self.classes
        return total

    def _chosen(self, hidden: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        """Logits [batch, chosen, classes, 2] of the instances of highest score, highest first."""
        count = min(self.params.k_sample, hidden.shape[1])
        score = score.detach().masked_fill(~mask, float("-inf"))
        places = score.topk(count, dim=1).indices
        rows = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))
        return self.classify_instance(rows).unflatten(2, (self.classes, 2))

    def _row_loss(self, logits: Tensor, target: int) -> Tensor:
        """Loss [batch, chosen, classes] of every instance and classifier with one target."""
        rows = logits.flatten(0, 2)
        targets = torch.full((len(rows),), target, device=rows.device)
        if self.params.instance_loss == "svm":
            found = smooth_top1_svm(rows, targets)
        else:
            found = F.cross_entropy(rows, targets, reduction="none")
        return found.unflatten(0, logits.shape[:3])

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


def _mean(
    loss: Float[Tensor, "batch chosen classes"], counts: Int64[Tensor, " batch"]
) -> Float[Tensor, "batch classes"]:
    """Mean over the first `counts` chosen of each bag; 0 where there are none."""
    taken = torch.arange(loss.shape[1], device=loss.device) < counts[:, None]
    return torch.einsum("bkc,bk->bc", loss, taken / counts.clamp_min(1)[:, None].to(loss.dtype))


def build(dim: int, classes: int, params: Params) -> ClamSB:
    """An untrained CLAM-SB for instances of `dim` numbers."""
    return ClamSB(dim, classes, params)
