"""ABMIL: attention pooling of instances (Ilse et al. 2018): gated, plain, or as CLAM has it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from stages.heads import _training
from stages.heads._training import Bags, Labels

CLAM_DROPOUT = 0.25  # of the authors' code


@dataclass(frozen=True)
class Params:
    """Section evaluate.abmil of params.yaml."""

    variant: Literal["gated", "plain", "clam"]  # equation 9; 8; gated with CLAM's dropout
    width: int  # outputs of the input projection (500 in the authors' code, 512 in CLAM's)
    attention_width: int  # hidden units of the attention (128; CLAM's small 256, big 384)
    training: _training.Training

    def __post_init__(self) -> None:
        """Reject layers without units."""
        for name in ("width", "attention_width"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"evaluate.abmil.{name} is {getattr(self, name)}: it must be 1 or more"
                )


class ABMIL(nn.Module):
    """Input projection, one attention branch, linear classifier.

    Source:
        Ilse et al. 2018, https://arxiv.org/abs/1802.04712, equations 7 to 9, with the biases of
        the authors' code. Differs from it in the output: one logit per class and cross-entropy in
        place of a single sigmoid logit (the same functions for two classes), and instances are
        standardised by the train instances where `training` says so, so that one learning rate
        serves every encoder. Variant `clam` is what most papers call ABMIL: the bag's part of Lu
        et al. 2021, https://arxiv.org/abs/2004.09666, gated, with dropout of 0.25 behind the
        projection and behind both branches of the attention, without the instance loss.
    """

    def __init__(self, dim: int, classes: int, params: Params) -> None:
        super().__init__()
        self.params = params
        self.standardise = _training.Standardise(dim)
        self.project = nn.Linear(dim, params.width)
        self.attend_tanh = nn.Linear(params.width, params.attention_width)
        self.attend_gate = None
        if params.variant != "plain":
            self.attend_gate = nn.Linear(params.width, params.attention_width)
        self.dropout = nn.Dropout(CLAM_DROPOUT if params.variant == "clam" else 0.0)
        self.attend_out = nn.Linear(params.attention_width, 1)
        self.classify = nn.Linear(params.width, classes)

    def forward(
        self,
        bag: Float[Tensor, "batch instance dim"],
        mask: Bool[Tensor, "batch instance"],
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch instance"]]:
        """Class logits and attention; where `mask` is False an instance is padding."""
        hidden = self.dropout(torch.relu(self.project(self.standardise(bag))))
        score = self.dropout(torch.tanh(self.attend_tanh(hidden)))  # [batch, instance, unit]
        if self.attend_gate is not None:
            score = score * self.dropout(torch.sigmoid(self.attend_gate(hidden)))
        score = self.attend_out(score).squeeze(2)  # [batch, instance]
        attention = score.masked_fill(~mask, float("-inf")).softmax(dim=1)
        pooled = torch.einsum("bi,biw->bw", attention, hidden)
        return self.classify(pooled), attention

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


def build(dim: int, classes: int, params: Params) -> ABMIL:
    """An untrained ABMIL for instances of `dim` numbers."""
    return ABMIL(dim, classes, params)
