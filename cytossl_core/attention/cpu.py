"""SR-attention on a CPU: after selection, only the kept pairs are worked on, both ways."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from cytossl_core.attention.inputs import Inputs
from cytossl_core.attention.pairs import Pairs, select
from cytossl_core.attention.sparse import sparse_attention

TENSORS = ("query", "key", "value", "table_q", "table_k", "table_v")  # that have gradients


def pairs_attention(x: Inputs) -> Float[Tensor, "batch head token head_dim"]:
    """Equation 9 by way of the kept pairs; the same numbers as `sparse_attention`.

    Takes neither dropout nor a gradient of the bias. Memory beyond inputs and outputs: the kept
    pairs, and the scores of a few heads at a time. `sparse_attention` takes over where a dropped
    pair could matter (0 x NaN is NaN), where most pairs are kept, and for second derivatives.

    Source:
        Cyto-SSL, equations 3 to 9. numpy's vectorised partition finds the h-th largest of each
        row; sums over kept pairs are embedding bags, weighted.
    """
    if not _finite(x.query, x.key, x.value, *x.tables.values()):
        return sparse_attention(x)
    with torch.no_grad():
        pairs, weight = select(x)
    most = 2 * len(weight) > x.query[..., 0].numel() * x.key.shape[2]  # ties by the thousand
    if most or not _finite(weight):
        return sparse_attention(x)
    return _PairsAttention.apply(x, pairs, weight, *_tensors(x))


def _finite(*tensors: Tensor) -> bool:
    """Whether no NaN or infinity is there (nor a sum that overflows: the answer may err so)."""
    with torch.no_grad():
        return all(tensor.sum().isfinite() for tensor in tensors)


def _tensors(x: Inputs) -> tuple[Tensor | None, ...]:
    return tuple(getattr(x, name) for name in TENSORS)


class _PairsAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pairs, weight, *tensors):
        out = pairs.sum(x.value.flatten(0, 2), pairs.column, weight).view_as(x.value)
        if x.table_v is not None:
            index = pairs.in_table(x.table_v)
            out += pairs.sum(x.table_v.flatten(0, 1), index, weight).view_as(out)
        others = {name: each for name, each in vars(x).items() if name not in TENSORS}
        ctx.settings = (others, pairs.token, pairs.heads)
        ctx.save_for_backward(*tensors, weight, pairs.row, pairs.column, pairs.start, pairs.bucket)
        return out

    @staticmethod
    def backward(ctx, grad):
        *tensors, weight, row, column, start, bucket = ctx.saved_tensors
        others, token, heads = ctx.settings
        x = Inputs(**dict(zip(TENSORS, tensors, strict=True)), **others)
        if torch.is_grad_enabled() or not _finite(grad):  # the former under create_graph
            return None, None, None, *_sparse_gradients(x, grad)
        pairs = Pairs(row, column, start, bucket, token, heads)
        return None, None, None, *_gradients(x, pairs, weight, grad)


def _sparse_gradients(
    x: Inputs, grad: Float[Tensor, "batch head token head_dim"]
) -> list[Tensor | None]:
    """Gradients of `TENSORS` by way of all pairs; they can be differentiated again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        named = {name: getattr(x, name) for name in TENSORS}
        own = {n: t.view_as(t) for n, t in named.items() if t is not None and t.requires_grad}
        out = sparse_attention(replace(x, **own))
        found = torch.autograd.grad(out, list(own.values()), grad, create_graph=create_graph)
    found = dict(zip(own, found, strict=True))
    return [found.get(name) for name in TENSORS]


def _gradients(
    x: Inputs,
    pairs: Pairs,
    weight: Float[Tensor, " pair"],
    grad: Float[Tensor, "batch head token head_dim"],
) -> tuple[Tensor | None, ...]:
    """Gradients of `TENSORS` by way of the kept pairs."""
    query_row, key_row, grad_row = (t.flatten(0, 2) for t in (x.query, x.key, grad))
    d_score = x.scale * _score_gradient(pairs, weight, grad_row, x.value, x.table_v)
    swapped, order = pairs.swapped(x.buckets if x.tables else None)
    d_query, d_table_k = _side(pairs, d_score, query_row, key_row, x.table_k)
    d_score = d_score.index_select(0, order)
    d_key, d_table_q = _side(swapped, d_score, key_row, query_row, x.table_q)
    d_value = swapped.sum(grad_row, swapped.column, weight.index_select(0, order))
    d_table_v = _table_gradient(pairs, weight, grad_row, x.table_v)
    d_query, d_key, d_value = (d.view_as(x.query) for d in (d_query, d_key, d_value))
    return d_query, d_key, d_value, d_table_q, d_table_k, d_table_v


def _score_gradient(
    pairs: Pairs,
    weight: Float[Tensor, " pair"],
    grad: Float[Tensor, "row head_dim"],
    value: Float[Tensor, "batch head token head_dim"],
    table_v: Float[Tensor, "#head bucket head_dim"] | None,
) -> Float[Tensor, " pair"]:
    """Gradient of the kept scores: the softmax's, of weights that meet value and r^V."""
    d_weight = _products(pairs, grad, value.flatten(0, 2))
    if table_v is not None:
        per_bucket = grad.view_as(value) @ table_v.mT  # [batch, head, token, bucket]
        entry = pairs.row.long() * table_v.shape[1] + pairs.bucket
        d_weight = d_weight + per_bucket.flatten().index_select(0, entry)
    mean = grad.new_zeros(len(grad)).index_add_(0, pairs.row, weight * d_weight)
    return weight * (d_weight - mean.index_select(0, pairs.row))


def _products(
    pairs: Pairs, left: Float[Tensor, "row head_dim"], right: Float[Tensor, "row head_dim"]
) -> Float[Tensor, " pair"]:
    """Per pair, left's row times right's column: what a bag gives as gradient of its weights."""
    with torch.enable_grad():
        weight = torch.zeros(len(pairs.row), dtype=left.dtype, requires_grad=True)
        bags = pairs.sum(right, pairs.column, weight)
    return torch.autograd.grad(bags, weight, left)[0]


def _side(
    pairs: Pairs,
    d_score: Float[Tensor, " pair"],
    own: Float[Tensor, "row head_dim"],
    other: Float[Tensor, "row head_dim"],
    table: Float[Tensor, "table_head bucket head_dim"] | None,
) -> tuple[Float[Tensor, "row head_dim"], Float[Tensor, "table_head bucket head_dim"] | None]:
    """Gradients of one side of own . (other + table): of own, and of the table that it meets."""
    d_own = pairs.sum(other, pairs.column, d_score)
    if table is not None:
        index = pairs.in_table(table)
        d_own += pairs.sum(table.flatten(0, 1), index, d_score)
    return d_own, _table_gradient(pairs, d_score, own, table)


def _table_gradient(
    pairs: Pairs,
    weight: Float[Tensor, " pair"],
    own: Float[Tensor, "row head_dim"],
    table: Float[Tensor, "table_head bucket head_dim"] | None,
) -> Float[Tensor, "table_head bucket head_dim"] | None:
    """Per bucket, the sum over pairs of weight times own's row, by way of a histogram."""
    if table is None:
        return None
    count = table.shape[1]
    entry = pairs.row.long() * count + pairs.bucket
    sums = own.new_zeros(len(own) * count).index_add_(0, entry, weight).view(-1, count)
    if len(table) == 1:
        return (sums.T @ own)[None]
    per_head = (t.view(-1, pairs.heads, pairs.token, t.shape[1]) for t in (sums, own))
    return torch.einsum("ihtc,ihtd->hcd", *per_head)
