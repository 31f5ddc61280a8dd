"""MoCo v3's loss: each query must find the key of its patch among the keys of the batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cytossl_core.losses.rows import check_pair, check_temperature, of_all_ranks, unit


def mocov3_loss(
    query1: Float[Tensor, "batch dim"],
    query2: Float[Tensor, "batch dim"],
    key1: Float[Tensor, "batch dim"],
    key2: Float[Tensor, "batch dim"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Contrast of each view's queries with the other view's keys, both ways, summed.

    Computed in float32 (or float64) inside autocast too. Keys of all ranks are negatives; no
    gradient flows into keys.

    Args:
        query1: Predictions from the first view of each patch, of any length.
        query2: Those from the second views.
        key1: The momentum encoder's projections of the first views.
        key2: Those of the second views.
        temperature: Divides the cosines; above 0 (0.2 for vision transformers).

    Returns:
        2 T (CE(query1, key2) + CE(query2, key1)), the mean over this rank's queries, in nats.

    Raises:
        ValueError: shapes that differ, an empty batch, or a temperature not above 0.

    Source:
        Chen, Xie and He 2021, Algorithm 1, https://arxiv.org/abs/2104.02057; the factor 2 T is
        printed there in `ctr`.
    """
    check_pair(query1, query2, "query1 and query2")
    check_pair(query1, key1, "query1 and key1")
    check_pair(query2, key2, "query2 and key2")
    check_temperature(temperature, "0.2 in MoCo v3")
    with torch.autocast(query1.device.type, enabled=False):
        return _contrast(query1, key2, temperature) + _contrast(query2, key1, temperature)


def _contrast(query: Tensor, key: Tensor, temperature: float) -> Float[Tensor, ""]:
    keys, begin = of_all_ranks(unit(key.detach()))
    own = torch.arange(begin, begin + len(query), device=query.device)
    return 2 * temperature * F.cross_entropy(unit(query) @ keys.T / temperature, own)
