"""DSMIL: instances weighed by their likeness to the most telling one (Li et al. 2021)."""

import math
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from stages.heads import _training
from stages.heads._training import Bags, Labels


@dataclass(frozen=True)
class Params:
    """Section evaluate.dsmil of params.yaml."""

    query_width: int  # numbers of a query (128 in the authors' code)
    training: _training.Training

    def __post_init__(self) -> None:
        """Reject queries without numbers."""
        if self.query_width < 1:
            raise ValueError(
                f"evaluate.dsmil.query_width is {self.query_width}: it must be 1 or more"
            )


class DSMIL(nn.Module):
    """Two streams: a linear score of every instance, and attention to the highest of them.

    Source:
        Li et al. 2021, https://arxiv.org/abs/2011.08939, section 3, in the authors' form:
        two-layer queries, the instances themselves as values, one convolution over all classes'
        bag vectors (a linear layer of them, written as such), orthogonal weights at the start, one
        output for two classes and one a class for more, each a sigmoid, the probability from the
        bag's stream alone. Differs from it for three classes or more: the sigmoids are divided by
        their sum, which changes no decision. A cosine schedule ends at 0, theirs at 5e-6.
        Instances are standardised by the train instances where `training` says so.

    The attention returned is that of the one output for two classes, and that of the class
    predicted for more.
    """

    def __init__(self, dim: int, classes: int, params: Params) -> None:
        super().__init__()
        self.params = params
        self.outputs = 1 if classes == 2 else classes
        self.standardise = _training.Standardise(dim)
        self.classify_instance = nn.Linear(dim, self.outputs)
        self.query = nn.Sequential(
            nn.Linear(dim, params.query_width),
            nn.ReLU(),
            nn.Linear(params.query_width, params.query_width),
            nn.Tanh(),
        )
        self.classify = nn.Linear(self.outputs * dim, self.outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw orthogonal weights, as the authors' code does in place of trained ones."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        bag: Float[Tensor, "batch instance dim"],
        mask: Bool[Tensor, "batch instance"],
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch instance"]]:
        """Logits whose softmax is the sigmoids' probability, and attention; 0 on padding."""
        _, of_bag, attention = self._streams(bag, mask)
        shown = of_bag.argmax(dim=1)[:, None, None].expand(-1, -1, attention.shape[2])
        attention = attention.gather(1, shown).squeeze(1)
        if self.outputs == 1:
            return F.pad(of_bag, (1, 0)), attention  # softmax of (0, z) is sigmoid(z)
        return F.logsigmoid(of_bag), attention

    def loss(
        self,
        bag: Float[Tensor, "batch instance dim"],
        mask: Bool[Tensor, "batch instance"],
        labels: Int64[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """Half of either stream's binary cross-entropy, mean over outputs and bags."""
        of_instance, of_bag, _ = self._streams(bag, mask)
        target = labels[:, None] if self.outputs == 1 else F.one_hot(labels, self.outputs)
        target = target.to(of_bag.dtype)
        return 0.5 * sum(
            F.binary_cross_entropy_with_logits(stream, target) for stream in (of_instance, of_bag)
        )

    def _streams(
        self, bag: Tensor, mask: Tensor
    ) -> tuple[
        Float[Tensor, "batch output"],
        Float[Tensor, "batch output"],
        Float[Tensor, "batch output instance"],
    ]:
        """Scores of the critical instances and of the bags, and the attention of each output."""
        bag = self.standardise(bag)
        score = self.classify_instance(bag).masked_fill(~mask[:, :, None], float("-inf"))
        critical = score.argmax(dim=1)  # [batch, output], a real instance always
        of_instance = score.gather(1, critical[:, None]).squeeze(1)
        query = self.query(bag)
        places = critical[:, :, None].expand(-1, -1, query.shape[2])
        likeness = query.gather(1, places) @ query.transpose(1, 2) / math.sqrt(query.shape[2])
        attention = likeness.masked_fill(~mask[:, None], float("-inf")).softmax(dim=2)
        of_bag = self.classify((attention @ bag).flatten(1))
        return of_instance, of_bag, attention

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


def build(dim: int, classes: int, params: Params) -> DSMIL:
    """An untrained DSMIL for instances of `dim` numbers."""
    return DSMIL(dim, classes, params)
