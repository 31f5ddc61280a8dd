"""Triton kernels, backward: each program owns its rows of the result, so order never varies."""

# ruff: noqa: N803  constants of a kernel are upper case, as in Triton's own code

from typing import no_type_check  # shape checks of the tests must not wrap what Triton parses

import triton
import triton.language as tl

from cytossl_core.attention.kernels import (
    gradient_product,
    load_ids,
    load_kept,
    load_rows,
    load_table,
    of_columns,
    of_rows,
    product,
    score_tile,
    store_rows,
    table_product,
)
from cytossl_core.attention.kernels_buckets import bucket_sums


@triton.jit
@no_type_check
def gradient_tile(
    q, k, v, g, of_query, of_key, of_grad, bias, ids, ids_t, row_lse, mean, kept, rows, columns,
    scale, token, words, width, bias_row, bias_column,
):  # fmt: skip
    """Weights of a tile [query, key] and the gradient of its scores, float32.

    of_grad [query, bucket] is the output gradient's product with r^V, or None. As in the
    definition, a row with NaN has NaN for weights of dropped keys too, and no gradient there.
    """
    scores = score_tile(
        q, k, of_query, of_key, bias, ids, ids_t, rows, columns, scale, token, width,
        bias_row, bias_column,
    )  # fmt: skip
    keep = load_kept(kept, rows, columns, token, words)
    weight = tl.where(keep | (row_lse != row_lse)[:, None], tl.exp(scores - row_lse[:, None]), 0.0)
    d_weight = product(g, tl.trans(v))
    if of_grad is not None:
        d_weight += tl.gather(of_grad, load_ids(ids, rows, columns, token, width), axis=1)
    return weight, tl.where(keep, weight * (d_weight - mean[:, None]), 0.0)


@triton.jit
@no_type_check
def add_part(
    parts, part, group, index, programs, count, dim, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Adds to this program's own share of a table's gradient, [group, program, bucket, dim].

    Kept in memory, in the cache mostly: in registers it would drive out what the tiles need.
    """
    start = parts + (group * programs + index).to(tl.int64) * count * dim
    bucket = tl.arange(0, BLOCK_C)
    before = load_rows(start, bucket, dim, count, dim, BLOCK_D)
    store_rows(start, bucket, dim, before + part, count, dim, BLOCK_D)
    tl.debug_barrier()


@triton.jit
@no_type_check
def backward_query(
    query, key, value, table_k, table_q, table_v, bias, ids, ids_t, order, last,
    grad, out, lse, kept, delta, d_query, parts_k, parts_v,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    g_batch, g_head, g_token, bias_batch, bias_head, bias_row, bias_column,
    k_table, q_table, v_table,
    scale, heads, token, dim, count, words, width, items, groups, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of blocks of queries, and what they add to r^K and r^V; writes delta.

    A program takes every `programs`-th block of the heads of its group.
    """
    group, index = tl.program_id(0) % groups, tl.program_id(0) // groups
    blocks = tl.cdiv(token, BLOCK_M)
    for block in range(index, items // groups * blocks, programs):
        item = (block // blocks * groups + group).to(tl.int64)
        batch, head, first = item // heads, item % heads, item * token
        rows = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load_rows(query + batch * q_batch + head * q_head, rows, q_token, token, dim, BLOCK_D)
        g = load_rows(grad + batch * g_batch + head * g_head, rows, g_token, token, dim, BLOCK_D)
        o = load_rows(
            out + (batch * token * heads + head) * dim, rows, heads * dim, token, dim, BLOCK_D
        )
        mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
        tl.store(delta + first + rows, mean, mask=rows < token)
        row_lse = tl.load(lse + first + rows, mask=rows < token, other=0.0)
        tile_bias = bias
        if bias is not None:
            tile_bias = bias + batch * bias_batch + head * bias_head
        of_query = None
        if table_k is not None:
            of_query = of_rows(q, load_table(table_k, head, k_table, count, dim, BLOCK_C, BLOCK_D))
        of_grad = None
        if table_v is not None:
            t_v = load_table(table_v, head, v_table, count, dim, BLOCK_C, BLOCK_D)
            of_grad = product(g, tl.trans(t_v.to(g.dtype)))
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        scores_in = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        weights_in = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start in range(0, token, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            k = load_rows(
                key + batch * k_batch + head * k_head, columns, k_token, token, dim, BLOCK_D
            )
            v = load_rows(
                value + batch * v_batch + head * v_head, columns, v_token, token, dim, BLOCK_D
            )
            of_key = None
            if table_q is not None:
                of_key = of_columns(
                    k, load_table(table_q, head, q_table, count, dim, BLOCK_C, BLOCK_D)
                )
            weight, d_score = gradient_tile(
                q, k, v, g, of_query, of_key, of_grad, tile_bias, ids, ids_t, row_lse, mean,
                kept + first * words, rows, columns, scale, token, words, width,
                bias_row, bias_column,
            )  # fmt: skip
            acc += gradient_product(d_score, k)
            if table_k is not None:
                scores_in += bucket_sums(
                    d_score, order, last, rows, start, token, width, BLOCK_N, BLOCK_C
                )
            if table_v is not None:
                weights_in += bucket_sums(
                    weight, order, last, rows, start, token, width, BLOCK_N, BLOCK_C
                )
        if table_k is not None:
            t_k = load_table(table_k, head, k_table, count, dim, BLOCK_C, BLOCK_D)
            acc += table_product(scores_in, t_k, q)
            part = table_product(tl.trans(scores_in), q, q) * scale
            add_part(parts_k, part, group, index, programs, count, dim, BLOCK_C, BLOCK_D)
        if table_v is not None:
            part = table_product(tl.trans(weights_in), g, g)
            add_part(parts_v, part, group, index, programs, count, dim, BLOCK_C, BLOCK_D)
        store_rows(d_query + first * dim, rows, dim, acc * scale, token, dim, BLOCK_D)


@triton.jit
@no_type_check
def backward_key(
    query, key, value, table_k, table_q, table_v, bias, ids, ids_t, order, last,
    grad, lse, kept, delta, d_key, d_value, parts_q,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    g_batch, g_head, g_token, bias_batch, bias_head, bias_row, bias_column,
    k_table, q_table, v_table,
    scale, heads, token, dim, count, words, width, items, groups, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of blocks of keys and their values, and what they add to r^Q."""
    group, index = tl.program_id(0) % groups, tl.program_id(0) // groups
    blocks = tl.cdiv(token, BLOCK_M)
    for block in range(index, items // groups * blocks, programs):
        item = (block // blocks * groups + group).to(tl.int64)
        batch, head, first = item // heads, item % heads, item * token
        columns = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        k = load_rows(key + batch * k_batch + head * k_head, columns, k_token, token, dim, BLOCK_D)
        v = load_rows(
            value + batch * v_batch + head * v_head, columns, v_token, token, dim, BLOCK_D
        )
        tile_bias = bias
        if bias is not None:
            tile_bias = bias + batch * bias_batch + head * bias_head
        of_key = None
        if table_q is not None:
            of_key = of_columns(k, load_table(table_q, head, q_table, count, dim, BLOCK_C, BLOCK_D))
        acc_key = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        acc_value = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        scores_in = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start in range(0, token, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            q = load_rows(
                query + batch * q_batch + head * q_head, rows, q_token, token, dim, BLOCK_D
            )
            g = load_rows(
                grad + batch * g_batch + head * g_head, rows, g_token, token, dim, BLOCK_D
            )
            row_lse = tl.load(lse + first + rows, mask=rows < token, other=0.0)
            mean = tl.load(delta + first + rows, mask=rows < token, other=0.0)
            of_query = None
            if table_k is not None:
                of_query = of_rows(
                    q, load_table(table_k, head, k_table, count, dim, BLOCK_C, BLOCK_D)
                )
            of_grad = None
            if table_v is not None:
                t_v = load_table(table_v, head, v_table, count, dim, BLOCK_C, BLOCK_D)
                of_grad = product(g, tl.trans(t_v.to(g.dtype)))
            weight, d_score = gradient_tile(
                q, k, v, g, of_query, of_key, of_grad, tile_bias, ids, ids_t, row_lse, mean,
                kept + first * words, rows, columns, scale, token, words, width,
                bias_row, bias_column,
            )  # fmt: skip
            acc_value += gradient_product(tl.trans(weight), g)
            acc_key += gradient_product(tl.trans(d_score), q)
            if table_q is not None:
                scores_in += bucket_sums(
                    tl.trans(d_score), order, last, columns, start, token, width, BLOCK_N, BLOCK_C
                )
        if table_q is not None:
            t_q = load_table(table_q, head, q_table, count, dim, BLOCK_C, BLOCK_D)
            acc_key += table_product(scores_in, t_q, k)
            part = table_product(tl.trans(scores_in), k, k) * scale
            add_part(parts_q, part, group, index, programs, count, dim, BLOCK_C, BLOCK_D)
        store_rows(d_key + first * dim, columns, dim, acc_key * scale, token, dim, BLOCK_D)
        store_rows(d_value + first * dim, columns, dim, acc_value, token, dim, BLOCK_D)
