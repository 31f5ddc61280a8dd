"""SimCLR's loss: each view must find the other view of its patch among all views of the batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cytossl_core.losses.rows import check_pair, check_temperature, of_all_ranks, unit


def nt_xent(
    first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"], temperature: float
) -> Float[Tensor, ""]:
    """Normalised temperature-scaled cross-entropy, the mean over this rank's anchors.

    Computed in float32 (or float64) inside autocast too. Negatives are the views of all ranks, and
    gradients flow to the ranks they came from: DDP's mean gradient is that of the whole batch.

    Args:
        first: Projections of one view of each patch, of any length.
        second: Those of the other views, in the same order.
        temperature: Divides the cosines; above 0 (0.1 in SimCLR's best runs, 0.5 on small batches).

    Returns:
        The loss in nats; 0 for a single patch, which has no negatives.

    Raises:
        ValueError: shapes that differ, an empty batch, or a temperature not above 0.

    Source:
        Chen et al. 2020, equation 1 and Algorithm 1, https://arxiv.org/abs/2002.05709.
    """
    check_pair(first, second, "first and second")
    check_temperature(temperature, "0.1 in SimCLR")
    with torch.autocast(first.device.type, enabled=False):
        first, second = unit(first), unit(second)
        (all_first, begin), (all_second, _) = of_all_ranks(first), of_all_ranks(second)
        own = torch.arange(begin, begin + len(first), device=first.device)
        itself = torch.cat([own, own + len(all_first)])
        other = itself.roll(len(own))
        cosines = torch.cat([first, second]) @ torch.cat([all_first, all_second]).T
        logits = (cosines / temperature).scatter(1, itself[:, None], -torch.inf)
        return F.cross_entropy(logits, other)
