"""SR-attention in Triton: scores never leave the chip; one bit per pair tells what was kept."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from cytossl_core.attention.inputs import Inputs

try:
    import triton

    from cytossl_core.attention import kernels_backward, kernels_forward
    from cytossl_core.attention.launch import (
        arguments_of,
        backward_tile,
        forward_tile,
        launch,
        pointers_of,
    )
except ImportError:  # a machine without Triton: `refusal` says so, the other paths work
    triton = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # read by Triton at import too

MOST_BUCKETS = 256  # a program holds the sums of a row's buckets
MOST_TOKENS = 16384
MOST_WIDTH = 256


def refusal(x: Inputs) -> str | None:
    """Why these inputs cannot take this path, or None if they can."""
    if triton is None:
        return "Triton is not installed"
    if not x.query.is_cuda and not INTERPRETED:
        return f"query is on {x.query.device}"
    if x.query.dtype == torch.float64:
        return "query is torch.float64"
    if x.query.shape[2] > MOST_TOKENS or x.query.shape[3] > MOST_WIDTH:
        most = f"{MOST_TOKENS} tokens or a width of {MOST_WIDTH}"
        return f"query has shape {tuple(x.query.shape)}, over {most}"
    if any(table.shape[1] > MOST_BUCKETS for table in x.tables.values()):
        return f"a table has more than {MOST_BUCKETS} buckets"
    if x.dropout:
        return f"dropout is {x.dropout}"
    if x.bias is not None and x.bias.requires_grad:
        return "bias requires a gradient"
    return None


def fused_attention(x: Inputs) -> Float[Tensor, "batch head token head_dim"]:
    """Equation 9 in fused kernels; the same numbers as `sparse_attention`, in float32.

    Deterministic: no atomics, and sums in a fixed order. Memory beyond inputs and outputs grows
    with tokens times buckets, plus one bit per pair, by which backward knows what forward kept.

    Source:
        Cyto-SSL, equations 3 to 9. Tiles after FlashAttention-2, https://arxiv.org/abs/2307.08691.
        The h-th largest is found by bisection on integers in the order of the scores: exact for
        any h in at most 32 counts.
    """
    query, key = x.query.float(), x.key.float()
    of_query = of_key = None
    if x.table_k is not None:
        of_query = query * x.scale @ x.table_k.float().mT  # [batch, head, token, bucket]
    if x.table_q is not None:
        of_key = key @ (x.table_q.float() * x.scale).mT
    buckets = None if x.buckets is None or not x.tables else _small(x.buckets)
    count = max((table.shape[1] for table in x.tables.values()), default=0)
    out, _, _, sums = torch.ops.cytossl.sr_forward(
        *(_unit_stride(t) for t in (x.query, x.key, x.value)), of_query, of_key, x.bias, buckets,
        x.scale, 0 if x.dense else x.topk, count if x.table_v is not None else 0,
    )  # fmt: skip
    return out if x.table_v is None else out + sums @ x.table_v.float()


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _small(buckets: Tensor) -> Tensor:
    if type(buckets) is not Tensor or torch.compiler.is_compiling():
        return buckets.to(torch.int16)
    return _small_once(buckets)


@lru_cache(maxsize=16)
def _small_once(buckets: Tensor) -> Tensor:
    """The ids in int16, made once per tensor."""
    return buckets.to(torch.int16)


@torch.library.custom_op("cytossl::sr_forward", mutates_args=())
def sr_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_query: Tensor | None,
    of_key: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    scale: float,
    topk: int,
    value_buckets: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output without r^V, log-sum-exp, kept bits, and weights summed by bucket for r^V.

    topk 0 is dense; value_buckets 0 leaves the sums out.
    """
    made = _empty(query, value_buckets)
    tile = forward_tile(query)
    whole = tile["BLOCK_N"] >= query.shape[2]
    kernel = kernels_forward.forward_whole if whole else kernels_forward.forward_tiled
    arguments = arguments_of(query, key, value, of_query, of_key, bias, value_buckets, scale)
    pointers = [*pointers_of(query, key, value, of_query, of_key, bias, buckets), *made]
    arguments |= {"topk": topk, "DENSE": topk == 0} | tile
    launch(kernel, query, tile["BLOCK_M"], pointers, arguments)
    return made


@sr_forward.register_fake
def _fake_forward(query, key, value, of_query, of_key, bias, buckets, scale, topk, value_buckets):
    return _empty(query, value_buckets)


@torch.library.custom_op("cytossl::sr_backward", mutates_args=())
def sr_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_query: Tensor | None,
    of_key: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    kept: Tensor,
    grad: Tensor,
    grad_sums: Tensor,
    scale: float,
    value_buckets: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, of_query and of_key; empty where there is none."""
    made = _empty_gradients(query, of_query, of_key)
    tile = backward_tile(query)
    arguments = tile | arguments_of(query, key, value, of_query, of_key, bias, value_buckets, scale)
    pointers = pointers_of(query, key, value, of_query, of_key, bias, buckets)
    pointers[3:3] = [grad]
    pointers += [lse, delta, kept, grad_sums]
    d_query, d_key, d_value, d_of_query, d_of_key = made
    launch(
        kernels_backward.backward_query, query, tile["BLOCK_M"],
        [*pointers, d_query, d_of_query], arguments,
    )  # fmt: skip
    launch(
        kernels_backward.backward_key, query, tile["BLOCK_N"],
        [*pointers, d_key, d_value, d_of_key], arguments,
    )  # fmt: skip
    return made


@sr_backward.register_fake
def _fake_backward(query, key, value, of_query, of_key, *rest):
    return _empty_gradients(query, of_query, of_key)


def _empty(query: Tensor, value_buckets: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = query.shape[:3]
    words = (rows[2] + 31) // 32
    return (
        query.new_empty(query.shape, dtype=torch.float32),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty((*rows, words), dtype=torch.int32),
        query.new_empty((*rows, value_buckets), dtype=torch.float32),
    )


def _empty_gradients(query, of_query, of_key) -> tuple[Tensor, ...]:
    rows = [query.new_empty(query.shape) for _ in range(3)]
    tables = [
        query.new_empty(0, dtype=torch.float32) if t is None else torch.empty_like(t)
        for t in (of_query, of_key)
    ]
    return *rows, *tables


def _save(ctx, inputs, output):
    *tensors, scale, topk, value_buckets = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = (scale, value_buckets)


def _backward(ctx, grad, grad_lse, grad_kept, grad_sums):
    *tensors, out, lse, kept, sums = ctx.saved_tensors
    scale, value_buckets = ctx.settings
    delta = (grad * out).sum(dim=-1) + (grad_sums * sums).sum(dim=-1)
    grad = grad.to(tensors[0].dtype).contiguous()
    made = torch.ops.cytossl.sr_backward(
        *tensors, lse, delta, kept, grad, grad_sums.contiguous(), scale, value_buckets
    )
    of_query, of_key = (
        None if given is None else d for given, d in zip(tensors[3:5], made[3:], strict=True)
    )
    return *made[:3], of_query, of_key, None, None, None, None, None


sr_forward.register_autograd(_backward, setup_context=_save)
