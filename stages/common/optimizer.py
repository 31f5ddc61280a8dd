"""The optimizer of a run: which parameters decay, what the schedules set, how gradients are cut."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Name = Literal["adam", "adamw"]


def build(parameters: list[Tensor], name: Name) -> torch.optim.Optimizer:
    """Adam or AdamW in two groups: what decays, and what does not (biases, norms: one axis)."""
    groups = [
        {"params": [value for value in parameters if value.ndim > 1], "decays": True},
        {"params": [value for value in parameters if value.ndim <= 1], "decays": False},
    ]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(groups, lr=0.0, weight_decay=0.0, fused=True)


def schedule(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Set what the next step goes by."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


@torch.no_grad()
def clip_each(parameters: list[Tensor], limit: float) -> Float[Tensor, ""]:
    """Scale the gradient of each tensor down to a norm of `limit`; 0 leaves them alone.

    Returns:
        The norm of all gradients together, before.

    Source:
        facebookresearch/dino, utils.py, clip_gradients: tensor by tensor, not the whole.
    """
    gradients = [value.grad for value in parameters if value.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))  # one kernel for hundreds of tensors
    if limit:
        scales = (limit / (norms + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, list(scales.unbind()))
    return norms.norm()
