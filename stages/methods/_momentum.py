"""Networks that follow another one slowly: teachers, targets, key encoders."""

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn


def copy_of(network: nn.Module) -> nn.Module:
    """The same network, without gradients; parameters that are frozen in it are shared."""
    frozen = {id(value): value for value in network.parameters() if not value.requires_grad}
    return steady(copy.deepcopy(network, frozen).requires_grad_(False), True)


def steady(follower: nn.Module, training: bool) -> nn.Module:
    """Set the mode of a follower: it never drops paths, but batch norms take the batch's numbers.

    A follower's running statistics are nobody's average; as in the official codes it normalises by
    what it sees, and gathers statistics of its own for the day that it is used.
    """
    follower.eval()
    for layer in follower.modules():
        if isinstance(layer, _BatchNorm):
            layer.train(training)
    return follower


def follow(follower: nn.Module, network: nn.Module, momentum: float) -> None:
    """Follower = momentum follower + (1 - momentum) network, parameter by parameter."""
    pairs = zip(follower.parameters(), network.parameters(), strict=True)
    moved = [pair for pair in pairs if pair[0] is not pair[1]]
    get_ema_multi_avg_fn(momentum)(*map(list, zip(*moved, strict=True)), None)
