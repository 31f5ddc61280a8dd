"""SR-attention as the equations read: slow, plain, and the judge of every faster path."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cytossl_core.attention.inputs import Inputs


def sr_scores(x: Inputs) -> Float[Tensor, "batch head query key"]:
    """P = (Q K^T + R) / sqrt(d), equations 3, 7 and 8, plus the additive bias if there is one."""
    scores = torch.einsum("bhid,bhjd->bhij", x.query, x.key)
    if x.table_k is not None:
        r_k = x.table_k[:, x.buckets].expand(x.heads, -1, -1, -1)  # [head, query, key, head_dim]
        scores = scores + torch.einsum("bhid,hijd->bhij", x.query, r_k)
    if x.table_q is not None:
        r_q = x.table_q[:, x.buckets].expand(x.heads, -1, -1, -1)  # row j, i: seen from the key
        scores = scores + torch.einsum("bhjd,hjid->bhij", x.key, r_q)
    scores = scores * x.scale
    return scores if x.bias is None else scores + x.bias


def dropped(
    scores: Float[Tensor, "batch head query key"], topk: int | None
) -> Bool[Tensor, "batch head query key"]:
    """Which scores equation 5 sets to -inf: those below the h-th largest of their row.

    Ties with the h-th largest stay, and so does NaN, which is below nothing.
    """
    if topk is None or topk >= scores.shape[-1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.detach().topk(topk, dim=-1).values[..., -1:]
    return scores < threshold


def softmax_or_zero(
    scores: Float[Tensor, "batch head query key"],
) -> Float[Tensor, "batch head query key"]:
    """Softmax over keys; a row without any key (all -inf) gives zeros and no gradient."""
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)


def reference_weights(x: Inputs) -> Float[Tensor, "batch head query key"]:
    """Softmax(M(P, h)), the attention weights of equations 5, 6 and 9."""
    scores = sr_scores(x)
    return softmax_or_zero(scores.masked_fill(dropped(scores, x.topk), -torch.inf))


def reference_attention(x: Inputs) -> Float[Tensor, "batch head query head_dim"]:
    """SR-Att(Q, K, V, h) = Softmax(M(P, h)) (V + r^V), equation 9.

    Source:
        Cyto-SSL, equations 3 to 9. r^Q, r^K and r^V are tables read at the iRPE bucket of the
        pair, Wu et al. 2021; as in its official code r^Q is read at [key, query].
    """
    weights = reference_weights(x)
    out = torch.einsum("bhij,bhjd->bhid", weights, x.value)
    if x.table_v is not None:
        r_v = x.table_v[:, x.buckets].expand(x.heads, -1, -1, -1)
        out = out + torch.einsum("bhij,hijd->bhid", weights, r_v)
    return out
