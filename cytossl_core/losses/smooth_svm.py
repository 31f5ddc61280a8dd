"""Smooth top-1 SVM loss: the right class must lead by a margin, the maximum made smooth."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


def smooth_top1_svm(
    scores: Float[Tensor, "row class"],
    labels: Int64[Tensor, " row"],
    alpha: float = 1.0,
    tau: float = 1.0,
) -> Float[Tensor, " row"]:
    """`tau * logsumexp((scores + alpha * [class is wrong]) / tau)` minus the right class's score.

    Computed in float32 (or float64) inside autocast too. As tau goes to 0 it becomes the
    multi-class hinge loss; with alpha 0 and tau 1 it is the cross-entropy.

    Args:
        scores: Any real numbers.
        labels: The right class of each row, from 0.
        alpha: Margin by which the right class must lead; 0 or more.
        tau: Temperature of the maximum; above 0.

    Returns:
        One loss a row, never below 0; the mean is the caller's, who may leave rows out.

    Raises:
        ValueError: alpha is below 0, tau is not above 0, or a label is no class of scores.

    Source:
        Berrada et al. 2018, https://arxiv.org/abs/1802.07595, the smoothed top-k loss of section 3
        with k = 1 and the margin times alpha. Differs from the authors' code in one thing: that
        takes the hard maximum for rows whose two largest scores are more than tau * ln(1000)
        apart; here the loss stays smooth, away by at most
        tau * ln(1 + (classes - 1) * exp(alpha / tau) / 1000).
    """
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}: it must be 0 or more (1 in CLAM)")
    if not tau > 0:
        raise ValueError(f"tau is {tau}: it must be above 0 (1 in CLAM)")
    classes = scores.shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}: scores has {classes} columns, so "
            f"they must be 0 to {classes - 1}"
        )
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        margin = alpha * (1 - F.one_hot(labels, classes).to(scores.dtype))
        right = scores.gather(1, labels[:, None])
        return tau * ((scores + margin - right) / tau).logsumexp(dim=1)
