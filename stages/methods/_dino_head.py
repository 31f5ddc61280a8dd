"""DINO's head: from embeddings to prototypes."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Head(nn.Module):
    """Embeddings to prototype logits: an MLP of 3 layers, then cosines with each prototype.

    Source:
        facebookresearch/dino, vision_transformer.py, DINOHead with norm_last_layer: a weight norm
        whose gain is frozen at 1 is a normalisation of the rows, which is how it is written here.
        MLP weights are drawn with a standard deviation of 0.02, prototypes as torch draws them.
    """

    def __init__(self, dim: int, hidden_dim: int, bottleneck_dim: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(bottleneck_dim, prototypes, bias=False)

    def forward(self, embedding: Float[Tensor, "row dim"]) -> Float[Tensor, "row prototype"]:
        """Cosines, from -1 to 1."""
        unit = F.normalize(self.mlp(embedding), dim=-1)
        return F.linear(unit, F.normalize(self.prototypes.weight, dim=1))
