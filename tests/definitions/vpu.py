"""VPU as its paper prints it, with probabilities and sums in place of logarithms."""

from torch import Tensor


def variational(phi_positive: Tensor, phi_unlabeled: Tensor) -> Tensor:
    """Equation 6: log of the mean of Phi over all, less the mean of log Phi over the positives."""
    total = sum(phi for phi in phi_unlabeled) / len(phi_unlabeled)
    return total.log() - sum(phi.log() for phi in phi_positive) / len(phi_positive)


def regulariser(phi_unlabeled: Tensor, phi_mixed: Tensor, share: float) -> Tensor:
    """Equation 9: squared differences of logarithms; a positive's own Phi is taken for 1."""
    total = 0.0
    for own, mixed in zip(phi_unlabeled, phi_mixed, strict=True):
        total = total + ((share * own + (1 - share) * 1).log() - mixed.log()) ** 2
    return total / len(phi_mixed)
