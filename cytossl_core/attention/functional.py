"""sr_attention: one function, several ways to compute it."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cytossl_core.attention.cpu import pairs_attention
from cytossl_core.attention.fused import fused_attention, refusal
from cytossl_core.attention.inputs import Inputs, check
from cytossl_core.attention.reference import reference_attention
from cytossl_core.attention.sparse import sparse_attention
from cytossl_core.attention.tracing import plain, transformed

BACKENDS = ("auto", "reference", "torch", "triton")


def sr_attention(
    query: Float[Tensor, "batch head token head_dim"],
    key: Float[Tensor, "batch head token head_dim"],
    value: Float[Tensor, "batch head token head_dim"],
    *,
    topk: int | None = None,
    buckets: Int64[Tensor, "token token"] | None = None,
    table_q: Float[Tensor, "#head bucket head_dim"] | None = None,
    table_k: Float[Tensor, "#head bucket head_dim"] | None = None,
    table_v: Float[Tensor, "#head bucket head_dim"] | None = None,
    scale: float | None = None,
    bias: Float[Tensor, "#batch #head #token #token"] | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Float[Tensor, "batch head token head_dim"]:
    """Top-h sparse attention with image relative position encoding.

    Scores are computed and compared in float32 (float64 for float64 inputs), also under autocast.
    A row keeps all scores not below its `topk`-th largest, ties included; no gradient flows
    through that threshold. A row whose keys are all at -inf gives zeros. NaN and infinity reach
    every output and gradient that the equations let them reach, through dropped keys too.

    Args:
        query: Q.
        key: K.
        value: V.
        topk: h, the scores kept per row; None, or no less than the tokens, is dense.
        buckets: Ids from `irpe_buckets`, needed with tables.
        table_q: r^Q, read at [key, query]; one for all heads or one per head.
        table_k: r^K, read at [query, key].
        table_v: r^V, read at [query, key].
        scale: Multiplies scores, tables' terms included; None is head_dim ** -0.5.
        bias: Added to the scores before selection, not scaled; -inf removes a key (padding).
        dropout: Share of weights set to zero; 0 when not training.
        backend: "reference", "torch", "triton", or "auto": the fastest that can do it.

    Raises:
        ValueError: shapes, dtypes or values that no path, or not the one asked for, can take.

    Source:
        Cyto-SSL, equations 3 to 9; selection after Zhao et al. 2019, Explicit Sparse Transformer,
        https://arxiv.org/abs/1912.11637; tables after Wu et al. 2021,
        https://arxiv.org/abs/2107.14222. `bias` and `dropout` are ours.
    """
    x = _inputs(query, key, value, topk, buckets, table_q, table_k, table_v, scale, bias, dropout)
    path = _path(x, backend)
    with without_autocast(query):
        return path(x if path is fused_attention else x.in_float32()).to(query.dtype)


def sr_attention_backend(
    query: Float[Tensor, "batch head token head_dim"],
    key: Float[Tensor, "batch head token head_dim"] | None = None,
    value: Float[Tensor, "batch head token head_dim"] | None = None,
    *,
    topk: int | None = None,
    buckets: Int64[Tensor, "token token"] | None = None,
    table_q: Float[Tensor, "#head bucket head_dim"] | None = None,
    table_k: Float[Tensor, "#head bucket head_dim"] | None = None,
    table_v: Float[Tensor, "#head bucket head_dim"] | None = None,
    scale: float | None = None,
    bias: Float[Tensor, "#batch #head #token #token"] | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> str:
    """The path that `sr_attention` takes when called with these: nothing is computed.

    Args are those of `sr_attention`; a key or value left out is like the query.

    Returns:
        "reference", "torch" or "triton".

    Raises:
        ValueError: what `sr_attention` would raise.
    """
    key, value = query if key is None else key, query if value is None else value
    x = _inputs(query, key, value, topk, buckets, table_q, table_k, table_v, scale, bias, dropout)
    named = {reference_attention: "reference", fused_attention: "triton"}
    return named.get(_path(x, backend), "torch")


def without_autocast(query: Tensor) -> torch.autocast:
    """A context in which scores keep their precision."""
    kind = query.device.type
    return torch.autocast("cpu" if kind == "meta" else kind, enabled=False)  # meta has none


def _inputs(query: Tensor, key: Tensor, value: Tensor, *others) -> Inputs:
    topk, buckets, table_q, table_k, table_v, scale, bias, dropout = others
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    x = Inputs(query, key, value, topk, buckets, table_q, table_k, table_v, scale, bias, dropout)
    check(x)
    return x


def check_backend(backend: str) -> None:
    """Refuse a backend that there is not."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")


def _path(x: Inputs, backend: str) -> Callable[[Inputs], Tensor]:
    check_backend(backend)
    if backend == "reference":
        if x.dropout:
            raise ValueError(f"dropout is {x.dropout}, which the reference has not: take 'torch'")
        return reference_attention
    why = refusal(x)
    if backend == "triton" and why is not None:
        raise ValueError(f"backend is 'triton', but {why}: take 'torch' or 'auto'")
    if backend == "triton" or (backend == "auto" and why is None and _needs_fusion(x)):
        return fused_attention
    return pairs_attention if _few_on_cpu(x) else sparse_attention


def _needs_fusion(x: Inputs) -> bool:
    """Whether torch's own attention does not do: on a GPU, with a selection or tables."""
    return x.query.is_cuda and not (x.dense and not x.tables) and not transformed()


def _few_on_cpu(x: Inputs) -> bool:
    """Whether working on the kept pairs alone is possible, and faster than on all pairs."""
    learned = x.bias is not None and x.bias.requires_grad
    possible = x.query.device.type == "cpu" and not (x.dense or x.dropout or learned)
    few = not x.dense and 2 * x.topk <= x.key.shape[2]
    return possible and few and plain(x.query, x.key, x.value, *x.tables.values())
