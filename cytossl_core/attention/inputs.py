"""What every attention path is given, checked once where it enters."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Inputs:
    """The arguments of `sr_attention`; `scale` and `heads` are filled in."""

    query: Tensor  # [batch, head, token, head_dim]
    key: Tensor
    value: Tensor
    topk: int | None  # None: dense
    buckets: Tensor | None  # Int64 [token, token]
    table_q: Tensor | None  # [head or 1, bucket, head_dim]
    table_k: Tensor | None
    table_v: Tensor | None
    scale: float
    bias: Tensor | None  # broadcasts to [batch, head, token, token]
    dropout: float

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.query.shape[1]

    @property
    def tables(self) -> dict[str, Tensor]:
        """The tables that are there, by argument name."""
        named = {"table_q": self.table_q, "table_k": self.table_k, "table_v": self.table_v}
        return {name: table for name, table in named.items() if table is not None}

    @property
    def dense(self) -> bool:
        """Whether every key is kept."""
        return self.topk is None or self.topk >= self.key.shape[2]

    def in_float32(self) -> "Inputs":
        """The same with float16 and bfloat16 raised to float32: selection needs its precision."""
        return replace(
            self,
            **{name: _raised(getattr(self, name)) for name in ("query", "key", "value", "bias")},
            **{name: _raised(table) for name, table in self.tables.items()},
        )


def _raised(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check(x: Inputs) -> None:
    """Refuse what no path could compute.

    Raises:
        ValueError: shapes that do not fit, topk below 1, an unsupported dtype, a table without
            buckets or with too few rows for them.
    """
    _check_query_key_value(x)
    if x.topk is not None and x.topk < 1:
        raise ValueError(f"topk is {x.topk}: it must be 1 or more, or None for dense attention")
    if not 0 <= x.dropout < 1:
        raise ValueError(f"dropout is {x.dropout}: it must be at least 0 and below 1")
    if x.bias is not None:
        _check_bias(x)
    if x.tables:
        _check_tables(x)


def _check_query_key_value(x: Inputs) -> None:
    shapes = [tuple(t.shape) for t in (x.query, x.key, x.value)]
    equal = shapes[0] == shapes[1] == shapes[2]  # a set would fix the batch where torch traces
    if len(shapes[0]) != 4 or not equal or 0 in shapes[0][1:]:
        raise ValueError(
            f"query, key and value have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}: they "
            "must be one non-empty [batch, head, token, head_dim]"
        )
    dtypes = {t.dtype for t in (x.query, x.key, x.value)}
    if len(dtypes) > 1 or x.query.dtype not in DTYPES:
        raise ValueError(
            f"query, key and value are {x.query.dtype}, {x.key.dtype} and {x.value.dtype}: they "
            "must be the same of float16, bfloat16, float32 and float64"
        )


def _check_bias(x: Inputs) -> None:
    full = (*x.query.shape[:3], x.key.shape[2])
    shape = tuple(x.bias.shape)
    if len(shape) != 4 or any(
        found not in (1, size) for found, size in zip(shape, full, strict=True)
    ):
        raise ValueError(f"bias has shape {shape}: it must broadcast to {full}, with four axes")
    if not x.bias.is_floating_point():
        raise ValueError(f"bias is {x.bias.dtype}: it must be floating point, -inf removing a key")


def _check_tables(x: Inputs) -> None:
    token, head_dim = x.query.shape[2:]
    if x.buckets is None:
        raise ValueError(f"{', '.join(x.tables)} came without buckets: give ids of irpe_buckets")
    if tuple(x.buckets.shape) != (token, token) or x.buckets.dtype != torch.int64:
        raise ValueError(
            f"buckets are {x.buckets.dtype} {tuple(x.buckets.shape)}: for {token} tokens they "
            f"must be int64 {(token, token)}, from irpe_buckets of the tokens' grid"
        )
    for name, table in x.tables.items():
        if table.ndim != 3 or table.shape[0] not in (1, x.heads) or table.shape[2] != head_dim:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}: it must be [{x.heads} or 1, bucket, "
                f"{head_dim}]"
            )
    if type(x.buckets) is Tensor and not torch.compiler.is_compiling():
        _check_bucket_count(x)
    counts = {name: table.shape[1] for name, table in x.tables.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"bucket counts are {counts}: size all tables by irpe_buckets")


def _check_bucket_count(x: Inputs) -> None:
    needed = _largest(x.buckets) + 1
    for name, table in x.tables.items():
        if table.shape[1] < needed:
            special = int((x.buckets == x.buckets[:, :1]).all(dim=1).sum())
            grid = len(x.buckets) - special
            raise ValueError(
                f"{name} has {table.shape[1]} buckets, but the ids of a grid of {grid} tokens "
                f"and {special} special tokens need {needed}: size it by irpe_buckets"
            )


@lru_cache(maxsize=16)
def _largest(buckets: Tensor) -> int:
    """Largest id; remembered per tensor, since it makes a GPU wait."""
    return int(buckets.max())
