"""Gated attention over a bag's instances, shared by the heads that pool with it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class GatedAttention(nn.Module):
    """`w . (tanh(V h) * sigmoid(U h))`: one score an instance, all with biases.

    Args:
        width: Numbers of an instance.
        hidden: Rows of V and of U.
        dropout: Share of either branch that training drops.

    Source:
        Ilse et al. 2018, https://arxiv.org/abs/1802.04712, equation 9, before its softmax.
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.tanh = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, 1)

    def forward(
        self, instances: Float[Tensor, "batch instance width"]
    ) -> Float[Tensor, "batch instance"]:
        """Scores, any real numbers; padding is the caller's to mask."""
        branch = self.dropout(torch.tanh(self.tanh(instances)))
        gate = self.dropout(torch.sigmoid(self.gate(instances)))
        return self.out(branch * gate).squeeze(2)
