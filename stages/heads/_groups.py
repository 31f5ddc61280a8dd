"""Random splits of bags into groups of equal size: drawn for training, seeded for inference."""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


def drawn(
    mask: Bool[Tensor, "batch instance"], groups: int
) -> Bool[Tensor, "batch group instance"]:
    """Who belongs to which group, from torch's generator; sizes differ by one at most.

    Args:
        mask: True on real instances; a bag with fewer of them than groups leaves groups empty.
        groups: Parts of each bag.
    """
    keys = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2.0)
    return _members(keys.argsort(dim=1).argsort(dim=1), mask, groups)


def seeded(
    mask: Bool[Tensor, "batch instance"], groups: int, splits: int
) -> Bool[Tensor, "batch split*group instance"]:
    """`splits` times as `drawn`, but of the number of real instances only: it never changes.

    Args:
        mask: True on real instances.
        groups: Parts of each bag in each split.
        splits: Splits; the groups of one stand beside each other.
    """
    rows = mask.cpu()
    places = {length: _places(length, splits) for length in set(rows.sum(dim=1).tolist())}
    padded = torch.zeros(len(rows), splits, rows.shape[1], dtype=torch.int64)
    for row, real in zip(padded, rows, strict=True):
        row[:, real] = places[int(real.sum())]
    padded = padded.to(mask.device).flatten(0, 1)
    members = _members(padded, mask.repeat_interleave(splits, dim=0), groups)
    return members.unflatten(0, (len(mask), splits)).flatten(1, 2)


def _places(length: int, splits: int) -> Int64[Tensor, "split instance"]:
    generator = torch.Generator()
    return torch.stack(
        [torch.randperm(length, generator=generator.manual_seed(at)) for at in range(splits)]
    )


def _members(
    places: Int64[Tensor, "batch instance"], mask: Bool[Tensor, "batch instance"], groups: int
) -> Bool[Tensor, "batch group instance"]:
    """Instances dealt out to the groups in the order of their places, like cards."""
    group = torch.arange(groups, device=mask.device)[:, None]
    return ((places % groups)[:, None] == group) & mask[:, None]
