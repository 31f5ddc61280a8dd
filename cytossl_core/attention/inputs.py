"""What every attention path is given, checked once where it enters."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cytossl_core.attention.irpe import Origin, origin
from cytossl_core.attention.tracing import plain

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
        ValueError: shapes that do not fit, topk below 1 or no whole number, an unsupported dtype,
            float64 mixed with others, a table without buckets or of another bucket count.
    """
    _check_query_key_value(x)
    check_topk(x.topk)
    if not 0 <= x.dropout < 1:
        raise ValueError(f"dropout is {x.dropout}: it must be at least 0 and below 1")
    if x.bias is not None:
        _check_bias(x)
    if x.tables:
        _check_tables(x)


def check_topk(topk: object) -> None:
    """Refuse what is no count of keys: below 1, broken, a truth value."""
    whole = isinstance(topk, int) and not isinstance(topk, bool)
    if topk is not None and not (whole and topk >= 1):
        raise ValueError(
            f"topk is {topk!r}: it must be a whole number of 1 or more, or None for dense attention"
        )


def check_fits(name: str, tensor: Tensor, query: Tensor) -> None:
    """Refuse what query cannot meet: no floating point, float64 beside float32, other device."""
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} and query on {query.device}: move one")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}: it must be floating point, of 16 bits or more")
    if (tensor.dtype == torch.float64) != (query.dtype == torch.float64):
        raise ValueError(
            f"{name} is {tensor.dtype} and query {query.dtype}: float64 goes with float64 alone, "
            "so convert one of them"
        )


def _check_query_key_value(x: Inputs) -> None:
    shapes = [tuple(t.shape) for t in (x.query, x.key, x.value)]
    equal = shapes[0] == shapes[1] == shapes[2]  # a set would fix the batch where torch traces
    if len(shapes[0]) != 4 or not equal or 0 in shapes[0][1:]:
        raise ValueError(
            f"query, key and value have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}: they "
            "must be one non-empty [batch, head, token, head_dim]"
        )
    devices = {t.device for t in (x.query, x.key, x.value)}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"query, key and value are on {found}: move them to one device")
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
    check_fits("bias", x.bias, x.query)


def _check_tables(x: Inputs) -> None:
    token, head_dim = x.query.shape[2:]
    if x.buckets is None:
        raise ValueError(f"{', '.join(x.tables)} came without buckets: give ids of irpe_buckets")
    if tuple(x.buckets.shape) != (token, token) or x.buckets.dtype != torch.int64:
        raise ValueError(
            f"buckets are {x.buckets.dtype} {tuple(x.buckets.shape)}: for {token} tokens they "
            f"must be int64 {(token, token)}, from irpe_buckets of the tokens' grid"
        )
    if x.buckets.device != x.query.device:
        raise ValueError(
            f"buckets are on {x.buckets.device} and query on {x.query.device}: give irpe_buckets "
            "the device"
        )
    for name, table in x.tables.items():
        if table.ndim != 3 or table.shape[0] not in (1, x.heads) or table.shape[2] != head_dim:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}: it must be [{x.heads} or 1, bucket, "
                f"{head_dim}]"
            )
        check_fits(name, table, x.query)
    if plain(x.buckets):
        _check_bucket_count(x, origin(x.buckets))
    counts = {name: table.shape[1] for name, table in x.tables.items()}
    first, *others = counts.values()
    if any(count != first for count in others):  # a set would compare traced sizes by identity
        raise ValueError(f"bucket counts are {counts}: size all tables by irpe_buckets")


def _check_bucket_count(x: Inputs, made: Origin | None) -> None:
    """Tables must fit the ids: exactly where their making is known, else up to the largest."""
    smallest, largest = (0, made.count - 1) if made else _extent(x.buckets)
    if smallest < 0:
        raise ValueError(f"buckets hold {smallest}: ids must be 0 or more, as of irpe_buckets")
    for name, table in x.tables.items():
        count = table.shape[1]
        if made and count != made.count:
            raise ValueError(
                f"{name} has {count} buckets, but ids of a {made.height} x {made.width} grid with "
                f"{made.special_tokens} special tokens (method {made.method}, ratio {made.ratio}) "
                f"have {made.count}: size it by irpe_buckets"
            )
        if count <= largest:
            raise ValueError(
                f"{name} has {count} buckets, but the largest of the ids is {largest}: size it by "
                "irpe_buckets of the tokens' grid and special tokens"
            )


_EXTENTS = WeakTensorKeyDictionary()  # per tensor; to look makes a GPU wait


def _extent(ids: Tensor) -> tuple[int, int]:
    """Smallest and largest id, looked up anew when someone wrote into the tensor."""
    version = None if ids.is_inference() else ids._version  # which inference tensors have not
    known = _EXTENTS.get(ids)
    if known is None or version is None or known[0] != version:
        known = _EXTENTS[ids] = (version, int(ids.min()), int(ids.max()))
    return known[1:]
