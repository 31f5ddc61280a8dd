"""SimCLR: of all views in the batch, each must find the other view of its own patch."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cytossl_core.losses import nt_xent
from stages.methods import _health
from stages.methods._checks import require, require_views
from stages.methods._heads import perceptron
from stages.methods._pair import Pair


@dataclass(frozen=True)
class Params:
    """Section pretrain.simclr of params.yaml; in brackets what SimCLR has."""

    views: Pair
    hidden_dim: int  # width of the projector's hidden layer (2048)
    projection_dim: int  # width of what is compared (128)
    temperature: float  # divides the cosines (0.1; 0.5 for batches of 256)

    def __post_init__(self) -> None:
        """Refuse values that the views and the loss cannot have."""
        require_views("simclr.views", self.views)
        for name in ("hidden_dim", "projection_dim"):
            require("simclr", name, getattr(self, name), 1, math.inf)
        require("simclr", "temperature", self.temperature, 1e-6, math.inf)


class SimCLR(nn.Module):
    """One encoder and its projector; no network follows.

    Source:
        Chen et al. 2020, Algorithm 1, https://arxiv.org/abs/2002.05709. Crops are nuclei-centered
        and of similar scale, after Cyto-SSL, Step 3.
    """

    def __init__(self, encoder: nn.Module, params: Params, image_px: int) -> None:
        super().__init__()
        self.params, self.encoder = params, encoder
        self.view_policies = params.views.policies(image_px)
        widths = [encoder.num_features, params.hidden_dim, params.projection_dim]
        self.projector = perceptron(widths, bias=False, norm_last=True)
        self._seen = _health.Seen()  # projections of either view, embeddings

    def forward(
        self,
        views: list[Float[Tensor, "batch 3 px px"]],
        progress: float,
        keys: Int64[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """NT-Xent of the two views, in nats."""
        Pair.check(views, "simclr")
        embedding = self.encoder(torch.cat(views))
        projection = self.projector(embedding)
        first, second = projection.chunk(2)
        self._seen.note(progress, len(first), first, second, embedding)
        return nt_xent(first, second, self.params.temperature)

    def after_backward(self, progress: float) -> None:
        """Nothing to do."""

    def after_step(self, progress: float) -> None:
        """Nothing follows."""

    def monitor(self, progress: float) -> dict[str, float]:
        """Signs of collapse, of the last step; see `_health`."""
        first, second, embedding = self._seen.rows()
        return {
            "embedding_std": _health.embedding_std(embedding),
            **_health.cosines(first, second),
        }


def build(encoder: nn.Module, params: Params, image_px: int) -> SimCLR:
    """SimCLR around an encoder."""
    return SimCLR(encoder, params, image_px)
