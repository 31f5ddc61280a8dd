"""BYOL's loss: the prediction must point where the target network's projection points."""

import torch
from jaxtyping import Float
from torch import Tensor

from cytossl_core.losses.rows import check_pair, unit


def byol_loss(
    prediction: Float[Tensor, "batch dim"], target: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    """Mean over the batch of 2 - 2 cos(prediction, target); from 0, when they agree, to 4.

    Computed in float32 (or float64) inside autocast too.

    Args:
        prediction: The online network's predictions, of any length.
        target: The target network's projections of the other view; no gradient flows into them.

    Raises:
        ValueError: shapes that differ, or an empty batch.

    Source:
        Grill et al. 2020, equation 2, https://arxiv.org/abs/2006.07733. The method adds the same
        with the views exchanged.
    """
    check_pair(prediction, target, "prediction and target")
    with torch.autocast(prediction.device.type, enabled=False):
        cosine = (unit(prediction) * unit(target.detach())).sum(dim=1)
        return (2 - 2 * cosine).mean()
