"""Bucket ids as the kernels read them, made once per ids and forgotten with them."""

from dataclasses import dataclass

import torch
from jaxtyping import Int8, Int16, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Plan:
    """Ids and where they lie; columns are filled up to a multiple of the tile, `width`.

    Ids outside the table and those of columns outside the sequence are `count`, where the kernels'
    copy of a table holds zeros. About 6 bytes per pair of tokens, for all heads and items.
    """

    ids: Int16[Tensor, "token width"]  # of [query, key]
    ids_t: Int16[Tensor, "token width"]  # at [query, key] the id of [key, query]
    order: UInt8[Tensor, "token width"]  # a tile's columns by bucket; top bit: a new bucket
    last: Int8[Tensor, "token tile bucket"]  # where in that order a bucket ends, or -1


_plans = WeakTensorKeyDictionary()  # of ids: their version, and plans by tile, count, BLOCK_C


def plan_of(buckets: Int64[Tensor, "token token"], count: int, tile: int, size: int) -> Plan:
    """The plan for tiles of `tile` columns, `size` > `count` buckets with padding.

    Made anew when the ids were edited in place. Inference tensors do not tell, so theirs are
    never kept.
    """
    if buckets.is_inference():
        return _make(buckets, count, tile, size)
    version, plans = _plans.get(buckets, (None, {}))
    if version != buckets._version:
        plans = {}
        _plans[buckets] = (buckets._version, plans)
    if (count, tile, size) not in plans:
        plans[count, tile, size] = _make(buckets, count, tile, size)
    return plans[count, tile, size]


@torch.inference_mode(False)  # kept for training, whoever asks first
@torch.no_grad()
def _make(buckets: Tensor, count: int, tile: int, size: int) -> Plan:
    token = len(buckets)
    known = buckets.where((buckets >= 0) & (buckets < count), count)
    ids, ids_t = (F.pad(t, (0, -token % tile), value=count) for t in (known, known.T))
    sorted_ids, order = ids.unflatten(1, (-1, tile)).sort(dim=-1, stable=True)
    new = F.pad(sorted_ids[..., 1:] != sorted_ids[..., :-1], (1, 0), value=True)
    last = torch.full((*sorted_ids.shape[:2], size), -1, device=ids.device)
    place = torch.arange(tile, device=ids.device).expand_as(sorted_ids)
    last = last.scatter_reduce_(-1, sorted_ids, place, "amax")
    return Plan(
        ids.to(torch.int16).contiguous(),
        ids_t.to(torch.int16).contiguous(),
        (order + 128 * new).to(torch.uint8).flatten(1),
        last.to(torch.int8),
    )
