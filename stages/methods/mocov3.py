"""MoCo v3: each view must find the slow copy's key of the other view among those of the batch."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cytossl_core.losses import mocov3_loss
from stages.common.schedules import cosine
from stages.methods import _health, _momentum
from stages.methods._checks import require, require_views
from stages.methods._heads import perceptron
from stages.methods._pair import Pair


@dataclass(frozen=True)
class Params:
    """Section pretrain.mocov3 of params.yaml; in brackets what MoCo v3 has for ViTs."""

    views: Pair
    hidden_dim: int  # width of the hidden layers of projector and predictor (4096)
    projection_dim: int  # width of what is compared (256)
    temperature: float  # divides the cosines (0.2)
    momentum: float  # share of the old key encoder that a step keeps, at first; ends at 1 (0.99)
    freeze_tokens: bool  # whether the projection of pixels to tokens stays as drawn (true)

    def __post_init__(self) -> None:
        """Refuse values that views, loss and networks cannot have."""
        require_views("mocov3.views", self.views)
        for name in ("hidden_dim", "projection_dim"):
            require("mocov3", name, getattr(self, name), 1, math.inf)
        require("mocov3", "temperature", self.temperature, 1e-6, math.inf)
        require("mocov3", "momentum", self.momentum, 0, 1)


class MoCoV3(nn.Module):
    """Query network with a predictor, and the key network that follows it.

    Source:
        Chen, Xie and He 2021, Algorithm 1, https://arxiv.org/abs/2104.02057, and
        facebookresearch/moco-v3. Differs in three things: the key network moves at the end of a
        step and not at the beginning of the next; and a vision transformer is timm's, whose
        positions are learned, where MoCo v3 has fixed sines and cosines, and whose weights are
        drawn as timm draws them, not as its vits.py does. Crops are nuclei-centered and of similar
        scale, after Cyto-SSL, Step 3.
    """

    def __init__(self, encoder: nn.Module, params: Params, image_px: int) -> None:
        super().__init__()
        self.params = params
        self.view_policies = params.views.policies(image_px)
        if params.freeze_tokens:
            _freeze_tokens(encoder)
        hidden, dim = params.hidden_dim, params.projection_dim
        widths = [encoder.num_features, hidden, hidden, dim]
        self.query = nn.Sequential(encoder, perceptron(widths, bias=False, norm_last=True))
        self.predictor = perceptron([dim, hidden, dim], bias=False, norm_last=True)
        self.key = _momentum.copy_of(self.query)
        self._seen = _health.Seen()  # queries, keys, embeddings

    @property
    def encoder(self) -> nn.Module:
        """The query encoder, which the official code keeps."""
        return self.query[0]

    def train(self, mode: bool = True) -> "MoCoV3":
        """As usual, but the key network never drops paths."""
        super().train(mode)
        _momentum.steady(self.key, mode)
        return self

    def forward(
        self,
        views: list[Float[Tensor, "batch 3 px px"]],
        progress: float,
        keys: Int64[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """The contrast of both views' queries with the other view's keys, summed."""
        Pair.check(views, "mocov3")
        embedding = [self.query[0](view) for view in views]  # a batch norm sees one view at once
        query = [self.predictor(self.query[1](one)) for one in embedding]
        with torch.no_grad():
            key = [self.key(view) for view in views]
        seen = torch.cat(query), torch.cat(key[::-1]), embedding[0]
        self._seen.note(progress, len(views[0]), *seen)
        return mocov3_loss(*query, *key, self.params.temperature)

    def after_backward(self, progress: float) -> None:
        """Nothing to do."""

    def after_step(self, progress: float) -> None:
        """The key network's parameters move towards the query network's."""
        _momentum.follow(self.key, self.query, self.momentum(progress))

    def momentum(self, progress: float) -> float:
        """Share of itself that the key network keeps: half a cosine up to 1."""
        return cosine(self.params.momentum, 1.0, progress)

    def monitor(self, progress: float) -> dict[str, float]:
        """Signs of collapse, of the last step; see `_health`."""
        query, key, embedding = self._seen.rows()
        return {
            "momentum": self.momentum(progress),
            "embedding_std": _health.embedding_std(embedding),
            **_health.cosines(query, key),
        }


def _freeze_tokens(encoder: nn.Module) -> None:
    if not hasattr(encoder, "patch_embed"):
        raise ValueError(
            f"params.yaml: pretrain.mocov3.freeze_tokens is true: {type(encoder).__name__} has no "
            "tokens to freeze, set it to false"
        )
    encoder.patch_embed.requires_grad_(False)


def build(encoder: nn.Module, params: Params, image_px: int) -> MoCoV3:
    """MoCo v3 around an encoder, which becomes the query network's."""
    return MoCoV3(encoder, params, image_px)
