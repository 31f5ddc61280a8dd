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
    through that threshold. NaN in a row gives NaN; a row whose keys are all at -inf gives zeros.

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
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    x = Inputs(query, key, value, topk, buckets, table_q, table_k, table_v, scale, bias, dropout)
    check(x)
    path = _path(x, backend)
    with torch.autocast(query.device.type, enabled=False):
        return path(x if path is fused_attention else x.in_float32()).to(query.dtype)


def sr_attention_backend(query: Float[Tensor, "batch head token head_dim"]) -> str:
    """The path that backend="auto" takes for such a query: "torch" or "triton"."""
    x = Inputs(query, query, query, 1, None, None, None, None, 1.0, None, 0.0)
    return "triton" if _path(x, "auto") is fused_attention else "torch"


def _path(x: Inputs, backend: str) -> Callable[[Inputs], Tensor]:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
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
    return x.query.is_cuda and not (x.dense and not x.tables)


def _few_on_cpu(x: Inputs) -> bool:
    """Whether working on the kept pairs alone is possible, and faster than on all pairs."""
    learned = x.bias is not None and x.bias.requires_grad
    possible = x.query.device.type == "cpu" and not (x.dense or x.dropout or learned)
    few = not x.dense and 2 * x.topk <= x.key.shape[2]
    return possible and few and not torch.compiler.is_compiling()
