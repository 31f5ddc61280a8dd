"""The Triton kernels as operators of torch: what autograd, compilers and exporters see."""

import torch
from torch import Tensor

from cytossl_core.attention import kernels_backward, kernels_forward
from cytossl_core.attention.launch import (
    arguments_of,
    backward_tiles,
    forward_tiles,
    launch,
    planned,
    processors,
    programs_of,
    strides_of,
)


@torch.library.custom_op("cytossl::sr_forward", mutates_args=())
def sr_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table_k: Tensor | None,
    table_q: Tensor | None,
    table_v: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    scale: float,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output in the query's dtype, log-sum-exp float32, kept pairs as bits of int32.

    Shapes [batch, head, token, head_dim], [batch, head, token], [batch, head, token, word]. topk 0
    is dense; tables are contiguous, [head or 1, bucket, head_dim].
    """
    made = _empty(query)
    batch, heads, token, dim = query.shape
    tables = [table_k, table_q, table_v]
    arguments = arguments_of(query, *tables, bias, scale)
    arguments |= strides_of("qkv", (query, key, value)) | {"topk": topk}

    def start(tile: dict) -> None:
        ids, sizes = planned(buckets, arguments["count"], token, tile)
        programs = batch * heads * (-(-token // tile["BLOCK_M"]))
        # fused multiply-adds would make a score depend on the code around it
        kernels_forward.forward[(programs,)](
            query, key, value, *tables, bias, *ids, *made,
            **arguments, **sizes, **tile, enable_fp_fusion=False,
        )  # fmt: skip

    if batch:
        launch(
            start, kernels_forward.forward, query,
            forward_tiles(token, dim, topk, arguments["count"] > 0, query.itemsize == 2),
            (topk, arguments["count"], *(t is None for t in tables)),
        )  # fmt: skip
    return made


@sr_forward.register_fake
def _fake_forward(query, *rest):
    return _empty(query)


@torch.library.custom_op("cytossl::sr_backward", mutates_args=())
def sr_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table_k: Tensor | None,
    table_q: Tensor | None,
    table_v: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    grad: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the tables; empty where there is no table."""
    d_query, d_key, d_value = (query.new_empty(query.shape) for _ in range(3))
    delta = torch.empty_like(lse)
    tables = [table_k, table_q, table_v]
    common = arguments_of(query, *tables, bias, scale)
    common |= strides_of("qkvg", (query, key, value, grad))
    inputs = [query, key, value, *tables, bias]

    def run(kernel, pointers: list, own: list) -> list:
        return _run_backward(kernel, inputs, buckets, pointers, own, common)

    d_k, d_v = run(
        kernels_backward.backward_query, [grad, out, lse, kept, delta, d_query], [table_k, table_v]
    )
    (d_q,) = run(kernels_backward.backward_key, [grad, lse, kept, delta, d_key, d_value], [table_q])
    return d_query, d_key, d_value, d_k, d_q, d_v


def _run_backward(kernel, inputs, buckets, pointers, own, common) -> list[Tensor]:
    """Starts a kernel whose programs write parts of the `own` tables' gradients; adds them up."""
    query, tables = inputs[0], inputs[3:6]
    batch, heads, token, dim = query.shape
    groups = heads if any(t is not None and len(t) > 1 for t in tables) else 1
    parts = []

    def start(tile: dict) -> None:
        blocks = batch * heads // groups * (-(-token // tile["BLOCK_M"]))
        programs = max(1, programs_of(query, own, blocks * groups, processors(query)) // groups)
        parts[:] = [
            None if t is None else query.new_zeros(
                (groups, programs, *t.shape[1:]), dtype=torch.float32
            )
            for t in own
        ]  # fmt: skip
        ids, sizes = planned(buckets, common["count"], token, tile)
        sizes |= {"items": batch * heads, "groups": groups, "programs": programs}
        kernel[(groups * programs,)](
            *inputs, *ids, *pointers, *parts, **common, **sizes, **tile, enable_fp_fusion=False
        )

    if batch:
        launch(
            start, kernel, query,
            backward_tiles(token, dim, common["count"] > 0, query.itemsize == 2),
            (common["count"], *(t is None for t in tables)),
        )  # fmt: skip
    return [_added(part, table, query) for part, table in zip(parts or own, own, strict=True)]


def _added(part: Tensor | None, table: Tensor | None, query: Tensor) -> Tensor:
    """A table's gradient from [group, program, bucket, head_dim], added in a fixed order."""
    if table is None:
        return query.new_empty(0)
    if part is table:  # an empty batch
        return torch.zeros_like(table)
    total = part.sum(dim=1)
    return (total if len(total) == len(table) else total.sum(dim=0, keepdim=True)).to(table.dtype)


@sr_backward.register_fake
def _fake_backward(query, key, value, table_k, table_q, table_v, *rest):
    rows = (query.new_empty(query.shape) for _ in range(3))
    tables = (
        query.new_empty(0) if t is None else torch.empty_like(t)
        for t in (table_k, table_q, table_v)
    )
    return *rows, *tables


def _empty(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, token, dim = query.shape
    return (
        query.new_empty(batch, token, heads, dim).transpose(1, 2),  # as layers read it next
        query.new_empty((batch, heads, token), dtype=torch.float32),
        query.new_empty((batch, heads, token, (token + 31) // 32), dtype=torch.int32),
    )


def _save(ctx, inputs, output):
    *tensors, scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.scale = scale


def _backward(ctx, grad, grad_lse, grad_kept):
    *tensors, out, lse, kept = ctx.saved_tensors
    if grad is None:
        return (None,) * 10
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    made = torch.ops.cytossl.sr_backward(*tensors, out, lse, kept, grad, ctx.scale)
    tables = (None if given is None else d for given, d in zip(tensors[3:6], made[3:], strict=True))
    return *made[:3], *tables, None, None, None, None


sr_forward.register_autograd(_backward, setup_context=_save)
