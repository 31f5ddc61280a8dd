"""Triton kernels, backward: each program owns its rows of the result, so order never varies."""

# ruff: noqa: N803  constants of a kernel are upper case, as in Triton's own code

from typing import no_type_check  # shape checks of the tests must not wrap what Triton parses

import triton
import triton.language as tl

from cytossl_core.attention.kernels import (
    bucket_sums,
    load_ids,
    load_kept,
    load_rows,
    product,
    score_tile,
    store_rows,
)


@triton.jit
@no_type_check
def gradient_tile(
    q, k, v, grad, q_table, k_table, bias, ids, lse, delta, kept, grad_hist, rows, columns,
    scale, token, count, words, bias_row, bias_column,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_V: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Weights of a tile and the gradient of its scores, for the keys that forward kept."""
    scores = score_tile(
        q, k, q_table, k_table, bias, ids, rows, columns, scale, token, count,
        bias_row, bias_column, HAS_K, HAS_Q, HAS_BIAS,
    )  # fmt: skip
    keep = load_kept(kept, rows, columns, token, words)
    row_lse = tl.load(lse + rows, mask=rows < token, other=0.0)
    weight = tl.where(keep, tl.exp(scores - row_lse[:, None]), 0.0)
    d_weight = product(grad, tl.trans(v))
    if HAS_V:
        bucket = load_ids(ids, rows[:, None], columns[None, :], token)
        inside = (rows[:, None] < token) & (columns[None, :] < token)
        d_weight += tl.load(grad_hist + rows[:, None] * count + bucket, mask=inside, other=0.0)
    mean = tl.load(delta + rows, mask=rows < token, other=0.0)
    return weight, tl.where(keep, weight * (d_weight - mean[:, None]), 0.0)


@triton.jit
@no_type_check
def backward_query(
    query, key, value, grad, q_table, k_table, bias, ids, lse, delta, kept, grad_hist,
    d_query, d_q_table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    bias_batch, bias_head, bias_row, bias_column,
    scale, heads, token, dim, count, words,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries and of their products with r^K."""
    blocks = tl.cdiv(token, BLOCK_M)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head, first = item // heads, item % heads, item * token
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    key += batch * k_batch + head * k_head
    value += batch * v_batch + head * v_head
    q = load_rows(query + batch * q_batch + head * q_head, rows, q_token, token, dim, BLOCK_D)
    g = load_rows(grad + first * dim, rows, dim, token, dim, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, token, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(key, columns, k_token, token, dim, BLOCK_D)
        v = load_rows(value, columns, v_token, token, dim, BLOCK_D)
        _, d_score = gradient_tile(
            q, k, v, g, q_table + first * count, k_table + first * count,
            bias + batch * bias_batch + head * bias_head, ids, lse + first, delta + first,
            kept + first * words, grad_hist + first * count, rows, columns, scale, token, count,
            words, bias_row, bias_column, HAS_K, HAS_Q, HAS_V, HAS_BIAS,
        )  # fmt: skip
        acc += product(d_score.to(k.dtype), k)
        if HAS_K:
            bucket = load_ids(ids, rows[:, None], columns[None, :], token)
            sums = bucket_sums(sums, d_score, bucket, count, 1, BLOCK_C)
    store_rows(d_query + first * dim, rows, acc * scale, token, dim, BLOCK_D)
    if HAS_K:
        store_rows(d_q_table + first * count, rows, sums, token, count, BLOCK_C)


@triton.jit
@no_type_check
def backward_key(
    query, key, value, grad, q_table, k_table, bias, ids, lse, delta, kept, grad_hist,
    d_key, d_value, d_k_table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    bias_batch, bias_head, bias_row, bias_column,
    scale, heads, token, dim, count, words,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys, their values, and their products with r^Q."""
    blocks = tl.cdiv(token, BLOCK_N)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head, first = item // heads, item % heads, item * token
    columns = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    query += batch * q_batch + head * q_head
    k = load_rows(key + batch * k_batch + head * k_head, columns, k_token, token, dim, BLOCK_D)
    v = load_rows(value + batch * v_batch + head * v_head, columns, v_token, token, dim, BLOCK_D)
    acc_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, token, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_rows(query, rows, q_token, token, dim, BLOCK_D)
        g = load_rows(grad + first * dim, rows, dim, token, dim, BLOCK_D)
        weight, d_score = gradient_tile(
            q, k, v, g, q_table + first * count, k_table + first * count,
            bias + batch * bias_batch + head * bias_head, ids, lse + first, delta + first,
            kept + first * words, grad_hist + first * count, rows, columns, scale, token, count,
            words, bias_row, bias_column, HAS_K, HAS_Q, HAS_V, HAS_BIAS,
        )  # fmt: skip
        acc_value += product(tl.trans(weight.to(g.dtype)), g)
        acc_key += product(tl.trans(d_score.to(q.dtype)), q)
        if HAS_Q:
            bucket = load_ids(ids, columns[None, :], rows[:, None], token)
            sums = bucket_sums(sums, d_score, bucket, count, 0, BLOCK_C)
    store_rows(d_key + first * dim, columns, acc_key * scale, token, dim, BLOCK_D)
    store_rows(d_value + first * dim, columns, acc_value, token, dim, BLOCK_D)
    if HAS_Q:
        store_rows(d_k_table + first * count, columns, sums, token, count, BLOCK_C)
