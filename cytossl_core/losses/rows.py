"""Rows of projections: unit vectors in float32 or better, and those of every rank."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def unit(projection: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """Each row at length 1 (a row of zeros stays), in float32, or float64 if it is that."""
    wide = projection.to(torch.promote_types(projection.dtype, torch.float32))
    return F.normalize(wide, dim=1)


def of_all_ranks(rows: Float[Tensor, "batch dim"]) -> tuple[Float[Tensor, "all dim"], int]:
    """The rows of every rank, in the order of ranks, and where this rank's begin.

    Gradients flow back to the rank that a row came from. Every rank must hold equally many rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    return torch.cat(all_gather(rows.contiguous())), dist.get_rank() * len(rows)


def check_pair(first: Tensor, second: Tensor, names: str) -> None:
    """Refuse two sets of projections that are not of the same patches.

    Raises:
        ValueError: the shapes are not one [batch, dim], or the batch is empty.
    """
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise ValueError(
            f"{names} have shapes {list(first.shape)} and {list(second.shape)}: both must be the "
            "same [batch, dim] of one patch or more"
        )


def check_temperature(temperature: float, published: str) -> None:
    """Refuse a temperature that nothing can be divided by.

    Raises:
        ValueError: it is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0 ({published})")
