"""The variational loss of positive-unlabelled learning, and its mixup regulariser."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def vpu_loss(
    log_phi_positive: Float[Tensor, " positive"],
    log_phi_unlabeled: Float[Tensor, " unlabeled"],
    log_phi_mixed: Float[Tensor, " mixed"],
    mixed_target: Float[Tensor, " target"],
    weight: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The variational loss and the weighted regulariser; training minimises their sum.

    Phi is the probability of the positive class. Needs no class prior. Computed in float32 (or
    float64) inside autocast too.

    Args:
        log_phi_positive: log Phi of samples that are known to be positive.
        log_phi_unlabeled: Of samples that may be either.
        log_phi_mixed: Of mixtures of the two.
        mixed_target: One for each: what these should be, see `mixed_log_target`.
        weight: Of the regulariser, 0 or more (LESS 0.03).

    Returns:
        log mean(Phi(unlabeled)) - mean(log Phi(positive)), and
        weight * mean((mixed_target - log_phi_mixed)^2); in nats, and nats squared.

    Raises:
        ValueError: there are no samples of a kind, shapes do not fit, or the weight is below 0.

    Source:
        Chen et al. 2020, https://arxiv.org/abs/1906.00642, equations 6 and 9.
    """
    given = {"positive": log_phi_positive, "unlabeled": log_phi_unlabeled, "mixed": log_phi_mixed}
    for name, values in given.items():
        if not len(values):
            raise ValueError(
                f"log_phi_{name} is {list(values.shape)}: it must be [sample], of one or more"
            )
    if mixed_target.shape != log_phi_mixed.shape or weight < 0:
        raise ValueError(
            f"mixed_target is {list(mixed_target.shape)}, log_phi_mixed "
            f"{list(log_phi_mixed.shape)}, weight {weight}: shapes must be the same, the weight 0 "
            "or more"
        )
    positive, unlabeled, mixed, target = map(
        _wide, (log_phi_positive, log_phi_unlabeled, log_phi_mixed, mixed_target)
    )
    variational = unlabeled.logsumexp(0) - math.log(len(unlabeled)) - positive.mean()
    return variational, weight * (target - mixed).square().mean()


def mixed_log_target(
    log_phi_unlabeled: Float[Tensor, " sample"], share: float
) -> Float[Tensor, " sample"]:
    """log(share * Phi(unlabeled) + (1 - share)): what a mixture with a positive should score.

    Gradients flow to `log_phi_unlabeled`, as in the authors' code.

    Raises:
        ValueError: `share`, the unlabelled sample's part in the mixture, is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: it must be from 0 to 1")
    if share == 1:
        return _wide(log_phi_unlabeled)
    own = _wide(log_phi_unlabeled)
    # log(0) has no gradient that is a number: the smallest double stands for it.
    rest = own.new_tensor(math.log1p(-share))
    return torch.logaddexp(own + math.log(max(share, 5e-324)), rest)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
