"""KoLeo: embeddings of a batch keep away from their nearest neighbours, and so spread evenly."""

import torch
from jaxtyping import Float
from torch import Tensor

from cytossl_core.losses.rows import of_all_ranks, unit

_SMALLEST = 1e-8  # distance at which two rows count as equal: keeps the logarithm finite


def koleo_loss(embedding: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Minus the mean logarithm of the distance from each unit row to its nearest other row.

    Computed in float32 (or float64) inside autocast too.

    Args:
        embedding: Rows of any length, of one view of each patch.

    Raises:
        ValueError: there is only one row on all ranks: it has no neighbour.

    Source:
        Sablayrolles et al. 2019, https://arxiv.org/abs/1806.03198, as DINOv2 uses it, Oquab et al.
        2023, https://arxiv.org/abs/2304.07193. Differs in one thing: neighbours are looked for
        among the rows of all ranks, so that the loss does not depend on their number.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        own = unit(embedding)
        rows, begin = of_all_ranks(own)
        if len(rows) < 2:
            raise ValueError(f"embedding has {len(rows)} rows on all ranks: KoLeo needs 2 or more")
        with torch.no_grad():
            cosine = own @ rows.T
            itself = torch.arange(begin, begin + len(own), device=own.device)
            nearest = cosine.scatter(1, itself[:, None], -torch.inf).argmax(dim=1)
        squared = (own - rows[nearest]).square().sum(dim=1)
        # sqrt of an exact 0 would have an infinite gradient
        return -(squared.clamp_min(_SMALLEST**2).sqrt()).log().mean()
