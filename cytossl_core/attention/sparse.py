"""SR-attention in plain torch, on any device: no [token, token, head_dim] temporary."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from cytossl_core.attention.inputs import Inputs
from cytossl_core.attention.reference import dropped, softmax_or_zero


def sparse_attention(x: Inputs) -> Float[Tensor, "batch head token head_dim"]:
    """Equation 9, by gathers and bucket histograms.

    Source:
        Cyto-SSL, equations 3 to 9. q r^K is one product with the table, read at the buckets; the
        weights of a bucket are summed before they meet r^V.
    """
    if x.dense and not x.tables:
        return F.scaled_dot_product_attention(
            x.query, x.key, x.value, x.bias, dropout_p=x.dropout, scale=x.scale
        )
    scores = table_scores(x)
    weights = softmax_or_zero(scores.masked_fill_(dropped(scores, x.topk), -torch.inf))
    weights = F.dropout(weights, x.dropout)
    out = weights @ x.value
    if x.table_v is not None:
        out = out + bucket_sums(weights, x.buckets, x.table_v.shape[1]) @ x.table_v
    return out


def table_scores(x: Inputs) -> Float[Tensor, "batch head query key"]:
    """The scores of equation 8, plus the bias."""
    query = x.query * x.scale
    scores = query @ x.key.mT
    if x.table_k is not None:
        scores += read(query @ x.table_k.mT, x.buckets)
    if x.table_q is not None:
        seen_from_key = (x.table_q * x.scale) @ x.key.mT  # [batch, head, bucket, key]
        shape = (*scores.shape[:2], -1, -1)
        scores += seen_from_key.gather(-2, x.buckets.T.expand(shape))
    if x.bias is not None:
        scores += x.bias
    return scores


def read(
    per_bucket: Float[Tensor, "batch head token bucket"], buckets: Int64[Tensor, "token token"]
) -> Float[Tensor, "batch head token token"]:
    """Entry [i, j] is row i's value at the bucket of (i, j)."""
    return per_bucket.gather(-1, buckets.expand(*per_bucket.shape[:2], -1, -1))


def bucket_sums(
    weights: Float[Tensor, "batch head token token"],
    buckets: Int64[Tensor, "token token"],
    count: int,
) -> Float[Tensor, "batch head token bucket"]:
    """Per row, the sum of the weights that fall in each bucket."""
    index = buckets.expand(*weights.shape[:2], -1, -1)
    return weights.new_zeros(*weights.shape[:3], count).scatter_add(-1, index, weights)
