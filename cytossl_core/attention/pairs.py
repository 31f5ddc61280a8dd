"""Selection on a CPU: which (query, key) pairs are kept, and how to sum over them.

numpy selects about three times faster than torch; without it, torch does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cytossl_core.attention.inputs import Inputs
from cytossl_core.attention.sparse import table_scores

HAS_NUMPY = find_spec("numpy") is not None  # torch itself works without
CHUNK = 2**20  # scores at a time: 4 MB in float32, which stays in cache


@dataclass(frozen=True)
class Pairs:
    """Kept pairs, sorted by row; a row is one token of one head of one batch item.

    Row and column are the query's and the key's row, int32; `start[i]` is the first pair of row i,
    and one more entry closes the last row.
    """

    row: Int[Tensor, " pair"]
    column: Int[Tensor, " pair"]
    start: Int[Tensor, " row_and_end"]
    bucket: Int[Tensor, " pair"] | None  # the id at [row's token, column's token]
    token: int
    heads: int

    def swapped(
        self, ids: Int[Tensor, "token token"] | None
    ) -> tuple["Pairs", Int[Tensor, " pair"]]:
        """The same pairs seen from the key, and the order that sorts them so."""
        row, order = self.column.sort(stable=True)
        column = self.row.index_select(0, order)
        start, bucket = _starts(row, len(self.start)), _bucket_of(row, column, self.token, ids)
        return replace(self, row=row, column=column, start=start, bucket=bucket), order

    def sum(
        self,
        source: Float[Tensor, "source head_dim"],
        index: Int[Tensor, " pair"],
        weight: Float[Tensor, " pair"],
    ) -> Float[Tensor, "row head_dim"]:
        """Per row, the weighted sum of the source's rows at `index`."""
        return F.embedding_bag(
            index,
            source.detach(),  # its gradient is not wanted, and would make this twice as slow
            self.start,
            mode="sum",
            per_sample_weights=weight,
            include_last_offset=True,
        )

    def in_table(self, table: Float[Tensor, "head bucket head_dim"]) -> Int[Tensor, " pair"]:
        """Row of the flattened table: the pair's bucket, in the table of its head."""
        if len(table) == 1:
            return self.bucket
        return self.bucket + self.row // self.token % self.heads * table.shape[1]


def _bucket_of(
    row: Int[Tensor, " pair"],
    column: Int[Tensor, " pair"],
    token: int,
    ids: Int[Tensor, "token token"] | None,
) -> Int[Tensor, " pair"] | None:
    """The ids of pairs at [row's token, column's token], if there are ids."""
    if ids is None:
        return None
    first = row // token * token
    return ids.flatten().to(torch.int32).index_select(0, (row - first) * token + (column - first))


def select(x: Inputs) -> tuple[Pairs, Float[Tensor, " pair"]]:
    """The kept pairs and their attention weights."""
    first, rows, columns, weights = 0, [], [], []
    for part in _parts(x):
        row, column, weight, count = _select_part(part)
        rows.append(row.add_(first))
        columns.append(column.add_(first))
        weights.append(weight)
        first += count
    row, column, token = torch.cat(rows), torch.cat(columns), x.query.shape[2]
    bucket = _bucket_of(row, column, token, x.buckets if x.tables else None)
    return Pairs(row, column, _starts(row, first + 1), bucket, token, x.heads), torch.cat(weights)


def _parts(x: Inputs) -> Iterator[Inputs]:
    """Pieces of the batch, or of one item's heads, whose scores make about a CHUNK."""
    batch, heads, token, _ = x.query.shape
    step = max(1, CHUNK // token**2)  # heads at a time
    items, some = max(1, step // heads), min(step, heads)
    for i in range(0, max(batch, 1), items):  # an empty batch is one empty piece
        for h in range(0, heads, some):
            yield _part(x, slice(i, i + items), slice(h, h + some))


def _part(x: Inputs, items: slice, heads: slice) -> Inputs:
    tables = {name: table[heads] if len(table) > 1 else table for name, table in x.tables.items()}
    bias = x.bias
    if bias is not None:
        bias = bias[items] if len(bias) > 1 else bias
        bias = bias[:, heads] if bias.shape[1] > 1 else bias
    query, key, value = (t[items, heads] for t in (x.query, x.key, x.value))
    return replace(x, query=query, key=key, value=value, bias=bias, **tables)


def _select_part(x: Inputs) -> tuple[Tensor, Tensor, Tensor, int]:
    """Row, column and weight of the kept pairs of a piece, and its number of rows."""
    scores = table_scores(x).flatten(0, 2)  # [row, key]
    count, token = scores.shape
    threshold = _largest(scores, x.topk).clamp(min=torch.finfo(scores.dtype).min)  # never -inf
    below = scores < threshold[:, None]  # never true of NaN, which so stays
    row, key = below.logical_not_().nonzero(as_tuple=True)
    weight = _softmax(scores.flatten().index_select(0, row * token + key), row, scores.amax(dim=1))
    row = row.int()
    return row, key.int() + row // token * token, weight, count


def _largest(scores: Float[Tensor, "row key"], topk: int) -> Float[Tensor, " row"]:
    """Per row, the topk-th largest score, NaN being the largest."""
    if not HAS_NUMPY:
        return scores.topk(topk).values[:, -1]
    ordered = scores.clone()
    ordered.numpy().partition(-topk, axis=-1)  # vectorised; NaN goes last
    return ordered[:, -topk]


def _softmax(score: Tensor, row: Tensor, largest: Tensor) -> Tensor:
    """Softmax over the kept pairs of a row, of which one has the row's largest score."""
    power = (score - largest.index_select(0, row)).exp_()
    total = torch.zeros_like(largest).index_add_(0, row, power)
    return power / total.index_select(0, row)


def _starts(row: Tensor, count: int) -> Tensor:
    """Where each of `count` rows starts in a sorted list of rows."""
    return torch.searchsorted(row, torch.arange(count, dtype=row.dtype), out_int32=True)
