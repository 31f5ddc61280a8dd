"""The optimizers of the heads, and the learning rate of a step."""

from typing import Literal

import torch
from timm.optim import Lookahead
from torch import nn

from stages.common import schedules

Name = Literal["adam", "adamw", "lookahead_radam"]
Schedule = Literal["constant", "cosine"]


def build(
    network: nn.Module, name: Name, betas: tuple[float, float], weight_decay: float
) -> list[torch.optim.Optimizer]:
    """One optimizer for each of the network's `parameter_groups`, or one for all of it.

    Source:
        `lookahead_radam`: Zhang et al. 2019, https://arxiv.org/abs/1907.08610, around Liu et al.
        2020, https://arxiv.org/abs/1908.03265, as TransMIL trains. Weight decay is L2 (in the
        gradient) but for adamw.
    """
    groups = [list(network.parameters())]
    if hasattr(network, "parameter_groups"):
        groups = network.parameter_groups()
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    kind = kinds.get(name, torch.optim.RAdam)
    made = [kind(group, lr=0.0, betas=betas, weight_decay=weight_decay) for group in groups]
    return [Lookahead(one) for one in made] if name == "lookahead_radam" else made


def rate_at(peak: float, kind: Schedule, warmup: float, progress: float) -> float:
    """Learning rate of a step; `warmup` and `progress` are shares of all steps, progress > 0.

    A line up to `peak` over the warm-up, then `peak`, or half a cosine to 0.
    """
    if kind == "cosine":
        return schedules.warmup_cosine(peak, 0.0, warmup, progress)
    return schedules.warmup_flat(0.0, peak, warmup, progress)


def step(
    optimizers: list[torch.optim.Optimizer], learning_rate: float, largest_norm: float
) -> None:
    """Take one step; above 0, `largest_norm` bounds the gradient's norm of each optimizer."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
            if largest_norm > 0:
                nn.utils.clip_grad_norm_(group["params"], largest_norm)
        optimizer.step()
        optimizer.zero_grad()
