"""BYOL: a network predicts what its slow copy makes of the other view; there are no negatives."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cytossl_core.losses import byol_loss
from stages.common.schedules import cosine
from stages.methods import _health, _momentum
from stages.methods._checks import require, require_views
from stages.methods._heads import perceptron
from stages.methods._pair import Pair


@dataclass(frozen=True)
class Params:
    """Section pretrain.byol of params.yaml; in brackets what BYOL has."""

    views: Pair
    hidden_dim: int  # width of the hidden layers of projector and predictor (4096)
    projection_dim: int  # width of what is compared (256)
    momentum: float  # share of the old target that a step keeps, at first; ends at 1 (0.996)

    def __post_init__(self) -> None:
        """Refuse values that the views and the networks cannot have."""
        require_views("byol.views", self.views)
        for name in ("hidden_dim", "projection_dim"):
            require("byol", name, getattr(self, name), 1, math.inf)
        require("byol", "momentum", self.momentum, 0, 1)


class BYOL(nn.Module):
    """Online network with a predictor, and the target that follows it.

    Source:
        Grill et al. 2020, equations 1 to 5, https://arxiv.org/abs/2006.07733. Crops are
        nuclei-centered and of similar scale, after Cyto-SSL, Step 3.
    """

    def __init__(self, encoder: nn.Module, params: Params, image_px: int) -> None:
        super().__init__()
        self.params = params
        self.view_policies = params.views.policies(image_px)
        hidden, dim = params.hidden_dim, params.projection_dim
        projector = perceptron([encoder.num_features, hidden, dim], bias=True, norm_last=False)
        self.online = nn.Sequential(encoder, projector)
        self.predictor = perceptron([dim, hidden, dim], bias=True, norm_last=False)
        self.target = _momentum.copy_of(self.online)
        self._seen = _health.Seen()  # predictions, targets, embeddings

    @property
    def encoder(self) -> nn.Module:
        """The online encoder, which the paper keeps."""
        return self.online[0]

    def train(self, mode: bool = True) -> "BYOL":
        """As usual, but the target never drops paths."""
        super().train(mode)
        _momentum.steady(self.target, mode)
        return self

    def forward(
        self,
        views: list[Float[Tensor, "batch 3 px px"]],
        progress: float,
        keys: Int64[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """2 - 2 cos of prediction and target, for either view as the target, summed."""
        Pair.check(views, "byol")
        embedding = [self.online[0](view) for view in views]  # a batch norm sees one view at once
        predicted = [self.predictor(self.online[1](one)) for one in embedding]
        with torch.no_grad():
            target = [self.target(view) for view in views]
        seen = torch.cat(predicted), torch.cat(target[::-1]), embedding[0]
        self._seen.note(progress, len(views[0]), *seen)
        return byol_loss(predicted[0], target[1]) + byol_loss(predicted[1], target[0])

    def after_backward(self, progress: float) -> None:
        """Nothing to do."""

    def after_step(self, progress: float) -> None:
        """The target's parameters move towards the online network's."""
        _momentum.follow(self.target, self.online, self.momentum(progress))

    def momentum(self, progress: float) -> float:
        """Share of itself that the target keeps: half a cosine up to 1."""
        return cosine(self.params.momentum, 1.0, progress)

    def monitor(self, progress: float) -> dict[str, float]:
        """Signs of collapse, of the last step; see `_health`."""
        predicted, target, embedding = self._seen.rows()
        return {
            "momentum": self.momentum(progress),
            "embedding_std": _health.embedding_std(embedding),
            **_health.cosines(predicted, target),
        }


def build(encoder: nn.Module, params: Params, image_px: int) -> BYOL:
    """BYOL around an encoder, which becomes the online network's."""
    return BYOL(encoder, params, image_px)
